package policy

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/types"
)

//go:embed schema/input.json
var inputSchemaJSON []byte

// inputSchema is the part of JSON schema that schema/input.json uses. Only
// anyOf is used for alternatives: OPA's type checker lets a misspelt field
// pass through oneOf.
type inputSchema struct {
	Title       string                  `json:"title"`
	Description string                  `json:"description"`
	Type        string                  `json:"type"`
	Enum        []string                `json:"enum"`
	Required    []string                `json:"required"`
	Properties  map[string]*inputSchema `json:"properties"`
	Items       *inputSchema            `json:"items"`
	AnyOf       []*inputSchema          `json:"anyOf"`
	Values      *valueSchema            `json:"additionalProperties"`
}

// valueSchema is the schema of values by any name; false: there are none.
type valueSchema struct{ inputSchema }

func (v *valueSchema) UnmarshalJSON(text []byte) error {
	if string(text) == "false" {
		return nil
	}
	return json.Unmarshal(text, &v.inputSchema)
}

func parseInputSchema() (*inputSchema, error) {
	var s inputSchema
	if err := json.Unmarshal(inputSchemaJSON, &s); err != nil {
		return nil, fmt.Errorf("input schema: %w", err)
	}
	return &s, nil
}

func schemaSet() (*ast.SchemaSet, error) {
	var raw any
	if err := json.Unmarshal(inputSchemaJSON, &raw); err != nil {
		return nil, fmt.Errorf("input schema: %w", err)
	}
	set := ast.NewSchemaSet()
	set.Put(ast.SchemaRootRef, raw)
	return set, nil
}

// narrow puts exact types into one that OPA read from this schema. OPA takes
// null, and the values of an object without fixed fields, for anything.
func (s *inputSchema) narrow(t types.Type) {
	object, ok := t.(*types.Object)
	if !ok {
		return
	}
	for _, p := range object.StaticProperties() {
		if name, ok := p.Key.(string); ok {
			p.Value = s.Properties[name].valueType()
		}
	}
}

func (s *inputSchema) valueType() types.Type {
	switch {
	case s == nil:
		return types.A
	case len(s.AnyOf) > 0:
		var t types.Type
		for _, a := range s.AnyOf {
			t = types.Or(t, a.valueType())
		}
		return t
	}
	switch s.Type {
	case "null":
		return types.Nl
	case "boolean":
		return types.B
	case "integer", "number":
		return types.N
	case "string":
		return types.S
	case "array":
		return types.NewArray(nil, s.Items.valueType())
	case "object":
		if len(s.Properties) == 0 && s.Values == nil {
			return types.NewObject(nil, types.NewDynamicProperty(types.S, types.A))
		}
		if len(s.Properties) == 0 {
			return types.NewObject(nil, types.NewDynamicProperty(types.S, s.Values.valueType()))
		}
		fields := make([]*types.StaticProperty, 0, len(s.Properties))
		for name, p := range s.Properties {
			fields = append(fields, types.NewStaticProperty(name, p.valueType()))
		}
		return types.NewObject(fields, nil)
	}
	return types.A
}

// alternatives are the schemas a value may have, null left out.
func (s *inputSchema) alternatives() []*inputSchema {
	if len(s.AnyOf) == 0 {
		return []*inputSchema{s}
	}
	var out []*inputSchema
	for _, a := range s.AnyOf {
		if a.Type != "null" {
			out = append(out, a)
		}
	}
	return out
}

// undefined is the first step of an input reference that no document of this
// schema can have, with what it could have been instead. OPA's own checker gets
// to see only rules in which nothing else is wrong.
func (s *inputSchema) undefined(ref ast.Ref) (step string, have []string, bad bool) {
	at := []*inputSchema{s}
	for _, term := range ref[1:] {
		var next []*inputSchema
		var names []string
		open := false
		for _, alt := range at {
			for _, a := range alt.alternatives() {
				switch {
				case a.Type == "array":
					next = append(next, a.Items)
				case a.Type == "object" && len(a.Properties) == 0:
					open = true
				default:
					for name, p := range a.Properties {
						names = append(names, name)
						if key, ok := term.Value.(ast.String); !ok || string(key) == name {
							next = append(next, p)
						}
					}
				}
			}
		}
		if open {
			return "", nil, false
		}
		if len(next) == 0 {
			slices.Sort(names)
			return term.String(), slices.Compact(names), true
		}
		at = next
	}
	return "", nil, false
}

// InputReference is the reference page of the policy input in Markdown, made
// from the schema.
func InputReference() string {
	s, err := parseInputSchema()
	if err != nil {
		return err.Error() + "\n" // a test parses the embedded schema
	}
	var b strings.Builder
	b.WriteString("# Policy input\n\n")
	b.WriteString("<!-- Generated from policy/schema/input.json; do not edit. -->\n\n")
	b.WriteString("What a policy sees as `input`. `spectrum-cap policy check` holds policies against it:\n")
	b.WriteString("a field that is not listed here is an error.\n\n")
	b.WriteString("| field | type | meaning |\n|---|---|---|\n")
	s.reference(&b, "input")
	return b.String()
}

func (s *inputSchema) reference(b *strings.Builder, path string) {
	names := make([]string, 0, len(s.Properties))
	for name := range s.Properties {
		names = append(names, name)
	}
	// Required fields first, in the schema's order; then the optional ones.
	slices.SortFunc(names, func(x, y string) int {
		ix, iy := slices.Index(s.Required, x), slices.Index(s.Required, y)
		switch {
		case ix >= 0 && iy >= 0:
			return ix - iy
		case ix >= 0:
			return -1
		case iy >= 0:
			return 1
		}
		return strings.Compare(x, y)
	})
	for _, name := range names {
		p := s.Properties[name]
		field := path + "." + name
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", field, p.typeName(!slices.Contains(s.Required, name)), p.meaning())
		for _, alt := range p.alternatives() {
			if alt.Title != "" {
				fmt.Fprintf(b, "| `%s` of kind `%s` | object | %s |\n", field, alt.Title, alt.Description)
			}
			alt.reference(b, field)
		}
	}
}

func (s *inputSchema) meaning() string {
	text := s.Description
	if len(s.Enum) > 0 {
		text += " One of `" + strings.Join(s.Enum, "`, `") + "`."
	}
	return text
}

func (s *inputSchema) typeName(optional bool) string {
	var names []string
	for _, a := range append([]*inputSchema{s}, s.AnyOf...) {
		switch a.Type {
		case "":
			continue
		case "array":
			names = append(names, "array of "+a.Items.Type+"s")
		default:
			names = append(names, a.Type)
		}
	}
	name := strings.Join(slices.Compact(names), " or ")
	if optional {
		name += ", optional"
	}
	return name
}
