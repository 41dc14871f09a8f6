package policy

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// This file lets one check say all that is wrong. The compiler works in stages
// and stops at the first that fails, and a file that does not parse takes away
// what others use. So in place of each rule that stops it stands another of the
// same name and shape whose value may be anything: what is wrong with the rest
// is found, and nothing is said of what only missed that rule.

// place is where a rule begins.
type place struct {
	file string
	row  int
}

func placeOf(loc *ast.Location) place { return place{loc.File, loc.Row} }

var (
	packageLine = regexp.MustCompile(`(?m)^package[ \t]+([A-Za-z_][\w.]*)`)
	ruleLine    = regexp.MustCompile(`(?m)^(?:default[ \t]+)?([A-Za-z_]\w*)(.*)$`)
	notRules    = []string{"package", "import", "else", "not", "some", "every", "input", "data"}
)

// standInModule is for a file that does not parse: its rules, as far as the
// lines that begin without indentation tell them.
func (c *compilation) standInModule(file string, text []byte) *ast.Module {
	pkg := pkgName(grantPackage)
	if m := packageLine.FindSubmatch(text); m != nil {
		pkg = string(m[1])
	}
	seen := map[string]bool{}
	rules := []string{"package " + pkg}
	var rows []int
	for _, m := range ruleLine.FindAllSubmatchIndex(text, -1) {
		name, rest := string(text[m[2]:m[3]]), string(text[m[4]:m[5]])
		if seen[name] || slices.Contains(notRules, name) {
			continue
		}
		seen[name] = true
		s := standIn{name: name, answer: pkg == pkgName(grantPackage)}
		switch {
		case strings.HasPrefix(rest, "("):
			if s.args = arity(name, rest); s.args == 0 {
				continue
			}
		case strings.HasPrefix(strings.TrimSpace(rest), "contains "):
			s.set = true
		case strings.HasPrefix(rest, "["):
			s.object = true
		}
		rules = append(rules, s.String())
		rows = append(rows, 1+bytes.Count(text[:m[0]], []byte("\n")))
	}
	m, err := ast.ParseModuleWithOpts(file, strings.Join(rules, "\n"), parserOptions)
	if err != nil {
		return nil // a name is a keyword: the others are not worth a guess
	}
	for i, rule := range m.Rules {
		rule.SetLoc(ast.NewLocation(nil, file, rows[i], 1))
		c.standIns[placeOf(rule.Loc())] = true
	}
	return m
}

// arity is how many arguments the head of a function has; 0 if that cannot be
// told from its first line.
func arity(name, rest string) int {
	for i, r := range rest {
		if r != ')' {
			continue
		}
		if expr, err := ast.ParseExpr(name + rest[:i+1]); err == nil && expr.IsCall() {
			return len(expr.Operands())
		}
	}
	return 0
}

// standIn is a rule whose value may be anything, in Rego.
type standIn struct {
	name   string
	args   int
	set    bool
	object bool
	answer bool // one that the broker asks, whose type is known
}

func (s standIn) String() string {
	value := "data.partition.anything"
	if s.answer {
		switch {
		case s.name == "allow":
			value = "true"
		case s.name == "limits":
			value = "{}"
		case slices.Contains(answers, s.name):
			value = `""`
		}
	}
	switch {
	case s.args > 0:
		return fmt.Sprintf("%s(%s) := data.partition.anything", s.name, strings.Join(slices.Repeat([]string{"_"}, s.args), ", "))
	case s.object:
		return s.name + "[k] := v if some k, v in data.partition.anything"
	case s.set:
		return s.name + " contains " + value
	}
	if s.answer && s.name != "allow" && slices.Contains(answers, s.name) {
		value = "{" + value + "}"
	}
	return s.name + " := " + value
}

func standInFor(m *ast.Module, rule *ast.Rule) (*ast.Rule, error) {
	ref := rule.Head.Ref()
	s := standIn{
		name: ref[0].String(), args: len(rule.Head.Args), object: len(ref) > 1,
		set: rule.Head.RuleKind() == ast.MultiValue, answer: m.Package.Path.Equal(grantPackage),
	}
	parsed, err := ast.ParseModuleWithOpts(rule.Loc().File, m.Package.String()+"\n"+s.String(), parserOptions)
	if err != nil {
		return nil, err
	}
	r := parsed.Rules[0]
	r.SetLoc(rule.Loc())
	r.Module = m
	return r, nil
}

// replaceFailed puts stand-ins in place of the rules that these errors are
// about, and tells whether there is any that had none yet.
func (c *compilation) replaceFailed(errs ast.Errors) bool {
	replaced := false
	for _, e := range errs {
		// These do not stop the compiler.
		if e.Location == nil || strings.HasSuffix(e.Message, " unused") {
			continue
		}
		failed := c.ruleAt(e.Location)
		if failed == nil {
			continue
		}
		// One of several rules in conflict stands for all.
		all := strings.Contains(e.Message, "conflict")
		for _, m := range c.own {
			for i, rule := range m.Rules {
				same := rule == failed || all && rule.Ref().GroundPrefix().Equal(failed.Ref().GroundPrefix())
				if !same || c.standIns[placeOf(rule.Loc())] {
					continue
				}
				with, err := standInFor(m, failed)
				if err != nil {
					continue
				}
				with.SetLoc(rule.Loc())
				m.Rules[i] = with
				c.standIns[placeOf(rule.Loc())] = true
				replaced = true
			}
		}
	}
	return replaced
}

// ruleAt is the rule of the sources that has that place in it.
func (c *compilation) ruleAt(loc *ast.Location) *ast.Rule {
	var at *ast.Rule
	for _, m := range c.own {
		for _, rule := range m.Rules {
			if rule.Loc().File == loc.File && rule.Loc().Row <= loc.Row {
				at = rule
			}
		}
	}
	return at
}
