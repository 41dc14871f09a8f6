package policy

import (
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
)

// checkIndexes warns of rules whose cost grows with the number of their
// fellows: OPA finds the rules that can hold by looking values of the input up
// in an index, and a rule without a comparison it can index is tried each time.
// One such rule costs nothing worth saying; only a rule set of some size does.
func (c *compilation) checkIndexes(compiler *ast.Compiler) {
	byName := map[string][]*ast.Rule{}
	var names []string
	for _, m := range c.own {
		if c.isTest(m) {
			continue
		}
		// The compiler's copy: its bodies are in the form that is indexed.
		for _, rule := range compiler.Modules[m.Package.Loc().File].Rules {
			name := rule.Ref().GroundPrefix().String()
			if byName[name] == nil {
				names = append(names, name)
			}
			byName[name] = append(byName[name], rule)
		}
	}
	for _, name := range names {
		tried := unindexed(compiler, byName[name][0].Ref().GroundPrefix())
		for _, rule := range byName[name] {
			if rule.Default || c.standIns[placeOf(rule.Loc())] {
				continue
			}
			if loc := iterates(rule); loc != nil {
				c.warn(loc, "iterates over a whole collection, which no index shortens: look up by key where that is possible")
			}
			if len(byName[name]) > 1 && tried[rule] {
				c.warn(rule.Loc(), "rule cannot be indexed: nothing in it compares a field of input with a constant, so every request tries it")
			}
		}
	}
}

func (c *compilation) warn(loc *ast.Location, format string, args ...any) {
	c.findings = append(c.findings, Finding{
		File: loc.File, Line: loc.Row, Col: loc.Col, Message: fmt.Sprintf(format, args...), Severity: SeverityWarning,
	})
}

// unlike answers every field of the input with a value no policy compares with.
type unlike struct{}

func (unlike) Resolve(ast.Ref) (ast.Value, error) { return ast.String("\x00 like nothing else"), nil }

// unindexed are the rules of that name that OPA's own index finds whatever the
// fields of the input are.
func unindexed(compiler *ast.Compiler, name ast.Ref) map[*ast.Rule]bool {
	index := compiler.RuleIndex(name)
	if index == nil {
		return nil
	}
	result, err := index.Lookup(unlike{})
	if err != nil {
		return nil
	}
	out := map[*ast.Rule]bool{}
	for _, rule := range result.Rules {
		out[rule] = true
	}
	return out
}

// iterates is where a rule walks a whole collection of its data: a reference
// with a variable that nothing has bound before it. A walk below a key that
// was looked up is short, and fine.
func iterates(rule *ast.Rule) *ast.Location {
	bound := ast.NewVarSet()
	for _, arg := range rule.Head.Args {
		bound.Update(arg.Vars())
	}
	for _, expr := range rule.Body {
		var at *ast.Location
		ast.WalkRefs(expr, func(ref ast.Ref) bool {
			if at != nil || !ref.HasPrefix(partitionData) {
				return at != nil
			}
			for _, term := range ref[1:] {
				if v, ok := term.Value.(ast.Var); ok && !bound.Contains(v) {
					at = expr.Loc()
				}
				if _, constant := term.Value.(ast.String); !constant {
					break
				}
			}
			return at != nil
		})
		if at != nil {
			return at
		}
		bound.Update(expr.Vars(ast.VarVisitorParams{}))
	}
	return nil
}
