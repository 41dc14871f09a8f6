package policy

import (
	"encoding/json"
	"fmt"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/valyala/fastjson"
)

// inputParsers keep their memory from one decision to the next.
var inputParsers fastjson.ParserPool

// inputKeys are the field names of the input as terms, made once: an input is
// mostly names.
var inputKeys = sync.OnceValue(func() map[string]*ast.Term {
	keys := map[string]*ast.Term{}
	var walk func(*inputSchema)
	walk = func(s *inputSchema) {
		for name, p := range s.Properties {
			keys[name] = ast.StringTerm(name)
			for _, a := range p.alternatives() {
				walk(a)
			}
		}
	}
	if s, err := parseInputSchema(); err == nil {
		walk(s)
	}
	return keys
})

// parseInput reads an input straight into OPA's values; by way of Go's maps it
// would take as long as the decision.
func parseInput(raw []byte) (*ast.Term, error) {
	parser := inputParsers.Get()
	defer inputParsers.Put(parser)
	v, err := parser.ParseBytes(raw)
	if err != nil {
		return nil, err
	}
	return inputTerm(v, inputKeys())
}

func inputTerm(v *fastjson.Value, keys map[string]*ast.Term) (*ast.Term, error) {
	switch v.Type() {
	case fastjson.TypeNull:
		return ast.NullTerm(), nil
	case fastjson.TypeTrue:
		return ast.InternedTerm(true), nil
	case fastjson.TypeFalse:
		return ast.InternedTerm(false), nil
	case fastjson.TypeNumber:
		return ast.NumberTerm(json.Number(v.String())), nil
	case fastjson.TypeString:
		text, err := v.StringBytes()
		if err != nil {
			return nil, err
		}
		return ast.StringTerm(string(text)), nil // a copy: the parser's memory is used again
	case fastjson.TypeArray:
		values, err := v.Array()
		if err != nil {
			return nil, err
		}
		terms := make([]*ast.Term, len(values))
		for i, value := range values {
			if terms[i], err = inputTerm(value, keys); err != nil {
				return nil, err
			}
		}
		return ast.ArrayTerm(terms...), nil
	case fastjson.TypeObject:
		object, err := v.Object()
		if err != nil {
			return nil, err
		}
		pairs := make([][2]*ast.Term, 0, object.Len())
		object.Visit(func(key []byte, value *fastjson.Value) {
			if err != nil {
				return
			}
			var term *ast.Term
			if term, err = inputTerm(value, keys); err != nil {
				return
			}
			name := keys[string(key)]
			if name == nil {
				name = ast.StringTerm(string(key))
			}
			pairs = append(pairs, [2]*ast.Term{name, term})
		})
		if err != nil {
			return nil, err
		}
		return ast.ObjectTerm(pairs...), nil
	}
	return nil, fmt.Errorf("a value of type %s", v.Type())
}
