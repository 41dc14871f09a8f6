package policy

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/types"
)

// comparisons are those whose operands may be of any type to OPA: one of two
// types is always the same, whatever the values. Equality OPA refuses itself.
var comparisons = map[string]string{"neq": "!=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}

// checkComparisons warns of comparisons of a field of the input with a value of
// a type that the field never has. Of variables nothing is said: what they are
// bound to elsewhere would have to be known.
func (c *compilation) checkComparisons(compiler *ast.Compiler) {
	check := func(call []*ast.Term, loc *ast.Location) {
		if len(call) != 3 || comparisons[call[0].String()] == "" || !compared(call[1]) || !compared(call[2]) {
			return
		}
		x, y := compiler.TypeEnv.GetByValue(call[1].Value), compiler.TypeEnv.GetByValue(call[2].Value)
		if x == nil || y == nil || compiler.PassesTypeCheck(ast.NewBody(ast.Equality.Expr(call[1], call[2]))) {
			return
		}
		c.warn(loc, "%s %s %s compares a %s with a %s, and so says nothing of either",
			call[1], comparisons[call[0].String()], call[2], types.Sprint(x), types.Sprint(y))
	}
	for _, m := range c.own {
		ast.NewGenericVisitor(func(x any) bool {
			switch x := x.(type) {
			case *ast.Expr:
				if len(x.With) > 0 {
					return true // it may be another input
				}
				if call, ok := x.Terms.([]*ast.Term); ok {
					check(call, x.Loc())
				}
			case *ast.Term:
				if call, ok := x.Value.(ast.Call); ok {
					check(call, x.Loc())
				}
			}
			return false
		}).Walk(m)
	}
}

// compared tells constants and fields of the input by constant names or any.
func compared(term *ast.Term) bool {
	ref, ok := term.Value.(ast.Ref)
	if !ok {
		return ast.IsConstant(term.Value)
	}
	for _, step := range ref[1:] {
		switch step.Value.(type) {
		case ast.String, ast.Number, ast.Var:
		default:
			return false
		}
	}
	return ref.HasPrefix(ast.InputRootRef)
}
