package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/types"
)

// This file holds the checks of the contract that can be made without
// evaluating: a rule that can never do what its name promises is an error when
// it is loaded, not a silent yes or no later.

func (c *compilation) isTest(m *ast.Module) bool {
	return strings.HasSuffix(m.Package.Loc().File, "_test.rego")
}

func (c *compilation) checkPackage(m *ast.Module) {
	p := m.Package.Path
	switch {
	case p.Equal(grantPackage), p.HasPrefix(libPackage) && len(p) > len(libPackage):
	case c.isTest(m) && p.Equal(testPackage):
	case p.HasPrefix(shippedPackage):
		c.report(m.Package.Loc(), "package %s is shipped with the broker and cannot be added to", pkgName(p))
	default:
		c.report(m.Package.Loc(), "package %s is never asked: use spectrum.grant, or partition.lib.NAME for helpers", pkgName(p))
	}
}

func pkgName(p ast.Ref) string { return strings.TrimPrefix(p.String(), "data.") }

// checkRules holds the rules of package spectrum.grant to their names, shapes
// and literal values.
func (c *compilation) checkRules(m *ast.Module) {
	if !m.Package.Path.Equal(grantPackage) {
		return
	}
	for _, rule := range m.Rules {
		ref := rule.Head.Ref()
		name := ref[0].String()
		if strings.HasPrefix(name, "_") || (c.isTest(m) && strings.HasPrefix(name, "test_")) {
			continue
		}
		if !slices.Contains(answers, name) {
			c.report(rule.Loc(), "rule %s has no meaning here: there are %s; the name of a helper starts with _",
				name, strings.Join(answers, ", "))
			continue
		}
		set := rule.Head.RuleKind() == ast.MultiValue
		switch {
		case len(ref) > 1:
			c.report(rule.Loc(), "%s must be %s, not an object (%s)", name, shape(name), rule.Head.Ref())
		case len(rule.Head.Args) > 0:
			c.report(rule.Loc(), "%s must be %s, not a function", name, shape(name))
		case name == "allow" && set:
			c.report(rule.Loc(), "allow must be a boolean, not a set")
		case name == "limits":
			c.checkLimitLiterals(rule)
		}
	}
}

// checkDefaults takes out every default rule after the first of its name, which
// the compiler would report without saying where it is.
func (c *compilation) checkDefaults() {
	first := map[string]*ast.Location{}
	for _, m := range c.own {
		m.Rules = slices.DeleteFunc(m.Rules, func(rule *ast.Rule) bool {
			name := rule.Ref().String()
			if !rule.Default {
				return false
			}
			if first[name] == nil {
				first[name] = rule.Loc()
				return false
			}
			c.report(rule.Loc(), "%s has a default already, in line %d of %s", rule.Head.Ref(), first[name].Row, first[name].File)
			return true
		})
	}
}

func shape(name string) string {
	switch name {
	case "allow":
		return "a boolean"
	case "limits":
		return "a set of objects"
	}
	return "a set of strings"
}

// checkLimitLiterals sees what types do not: unknown names and the values of
// numbers, in objects that are written out.
func (c *compilation) checkLimitLiterals(rule *ast.Rule) {
	check := func(term *ast.Term) {
		object, ok := term.Value.(ast.Object)
		if !ok {
			return
		}
		object.Foreach(func(key, value *ast.Term) {
			name, ok := key.Value.(ast.String)
			if !ok {
				return
			}
			switch v := value.Value.(type) {
			case ast.Number, ast.Boolean, ast.Null, ast.String:
				var l Limits
				if err := l.set(string(name), v); err != nil {
					c.report(value.Loc(), "%s", err)
				}
			default:
				if !slices.Contains(limitNames, string(name)) {
					c.report(key.Loc(), "%s", errUnknownLimit(string(name)))
				}
			}
		})
	}
	for r := rule; r != nil; r = r.Else {
		if key := r.Head.Key; key != nil {
			check(key)
		}
		if value := r.Head.Value; value != nil {
			if set, ok := value.Value.(ast.Set); ok {
				set.Foreach(check)
			}
		}
	}
}

// checkRefs finds calls of forbidden built-ins, documents a policy cannot
// read, and fields that the input never has. It tells whether there is a call.
func (c *compilation) checkRefs(m *ast.Module, schema *inputSchema, forbidden map[string]bool) (calls bool) {
	imports := map[string]bool{}
	for _, i := range m.Imports {
		imports[string(i.Name())] = true
		if ref, ok := i.Path.Value.(ast.Ref); ok {
			c.checkRef(m, ref, i.Path.Loc(), schema)
		}
	}
	call := func(ref ast.Ref, loc *ast.Location) {
		if name := ref.String(); forbidden[name] {
			c.report(loc, "built-in %s is not allowed in policies", name)
			calls = true
		}
	}
	ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.Import:
			return true
		case *ast.Expr:
			if x.IsCall() {
				call(x.Operator(), x.Loc())
			}
		case *ast.Term:
			switch v := x.Value.(type) {
			case ast.Call:
				if ref, ok := v[0].Value.(ast.Ref); ok {
					call(ref, x.Loc())
				}
			case ast.Ref:
				c.checkRef(m, v, x.Loc(), schema)
			}
		}
		return false
	}).Walk(m)
	return calls
}

func (c *compilation) checkRef(m *ast.Module, ref ast.Ref, loc *ast.Location, schema *inputSchema) {
	switch {
	case ref.HasPrefix(ast.InputRootRef):
		if step, have, bad := schema.undefined(ref); bad {
			c.report(loc, "undefined ref: %s: no field %s (have: %s)", ref, step, strings.Join(have, ", "))
		}
	case ref.HasPrefix(ast.DefaultRootRef) && len(ref) > 1:
		for _, ok := range []ast.Ref{partitionData, grantPackage, shippedPackage} {
			if ref.HasPrefix(ok) || ok.HasPrefix(ref.ConstantPrefix()) {
				return
			}
		}
		if c.isTest(m) && ref.HasPrefix(testPackage) {
			return
		}
		c.report(loc, "undefined ref: %s: a policy reads its own data as data.partition, and nothing else", ref)
	}
}

// checkTypes holds what the compiler inferred of the answers to their types.
func (c *compilation) checkTypes(compiler *ast.Compiler) {
	for _, name := range answers {
		rules := slices.DeleteFunc(slices.Clone(compiler.GetRulesExact(grantPackage.Append(ast.StringTerm(name)))), func(rule *ast.Rule) bool {
			return c.standIns[placeOf(rule.Loc())]
		})
		if len(rules) == 0 {
			continue
		}
		t := compiler.TypeEnv.GetByRef(rules[0].Ref())
		rule := blamed(compiler, rules, name)
		switch {
		case !typeFits(name, t):
			c.report(rule.Loc(), "%s must be %s, not %s", name, shape(name), types.Sprint(t))
		case name == "limits":
			c.checkLimitTypes(rule, t)
		}
	}
}

// blamed is the rule whose own type is wrong, as far as its head tells: the
// inferred type is that of all rules together.
func blamed(compiler *ast.Compiler, rules []*ast.Rule, name string) *ast.Rule {
	var unknown *ast.Rule
	for _, rule := range rules {
		t := compiler.TypeEnv.GetByValue(cmp.Or(rule.Head.Key, rule.Head.Value).Value)
		if t == nil {
			unknown = cmp.Or(unknown, rule)
			continue
		}
		if rule.Head.Key != nil {
			t = types.NewSet(t)
		}
		if !typeFits(name, t) {
			return rule
		}
	}
	return cmp.Or(unknown, rules[0])
}

func typeFits(name string, t types.Type) bool {
	if t == nil || isUnknown(t) {
		return true
	}
	if name == "allow" {
		return every(t, isBoolean)
	}
	return every(t, func(t types.Type) bool {
		set, ok := t.(*types.Set)
		if !ok {
			return false
		}
		of := set.Of()
		if of == nil || isUnknown(of) {
			return true
		}
		return every(of, func(t types.Type) bool {
			if name == "limits" {
				_, ok := t.(*types.Object)
				return ok
			}
			_, ok := t.(types.String)
			return ok
		})
	})
}

func (c *compilation) checkLimitTypes(rule *ast.Rule, t types.Type) {
	// A literal was reported where it is written.
	report := func(format string, args ...any) {
		message := fmt.Sprintf(format, args...)
		if !slices.ContainsFunc(c.findings, func(f Finding) bool { return f.Message == message }) {
			c.report(rule.Loc(), "%s", message)
		}
	}
	every(t, func(t types.Type) bool {
		set, ok := t.(*types.Set)
		if !ok || set.Of() == nil {
			return true
		}
		return every(set.Of(), func(t types.Type) bool {
			object, ok := t.(*types.Object)
			if !ok {
				return true
			}
			for _, p := range object.StaticProperties() {
				name, ok := p.Key.(string)
				switch {
				case !ok:
					report("%s", errUnknownLimit(fmt.Sprint(p.Key)))
				case !slices.Contains(limitNames, name):
					report("%s", errUnknownLimit(name))
				case isUnknown(p.Value):
				// Arithmetic has a type of alternatives, so one that fits is enough.
				case name == "read_only" && !some(p.Value, isBoolean):
					report("limit read_only must be a boolean, not %s", types.Sprint(p.Value))
				case name != "read_only" && !some(p.Value, isNumber):
					report("limit %s must be a number, not %s", name, types.Sprint(p.Value))
				}
			}
			return true
		})
	})
}

func isUnknown(t types.Type) bool {
	alternatives, ok := t.(types.Any)
	return ok && len(alternatives) == 0
}

func isBoolean(t types.Type) bool { _, ok := t.(types.Boolean); return ok }
func isNumber(t types.Type) bool  { _, ok := t.(types.Number); return ok }

// every holds for each alternative of a type.
func every(t types.Type, fits func(types.Type) bool) bool {
	if alternatives, ok := t.(types.Any); ok {
		return !slices.ContainsFunc(alternatives, func(t types.Type) bool { return !every(t, fits) })
	}
	return fits(t)
}

// some holds for at least one alternative of a type.
func some(t types.Type, fits func(types.Type) bool) bool {
	return !every(t, func(t types.Type) bool { return !fits(t) })
}
