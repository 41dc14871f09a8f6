package policy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// decision is what one evaluation says: the payload of a worker's reply.
type decision struct {
	Allow   bool     `json:"allow"`
	Deny    []string `json:"deny,omitempty"`
	Ask     []string `json:"ask,omitempty"`
	Limits  Limits   `json:"limits"`
	Error   *Reason  `json:"error,omitempty"`
	Reasons []Reason `json:"reasons,omitempty"` // of an explanation only
}

// Bounds of what a policy may say.
const (
	maxMessages     = 100
	maxMessageBytes = 2000
)

// decide evaluates raw, an Input in JSON.
func (p *program) decide(raw []byte) decision {
	input, err := parseInput(raw)
	if err != nil {
		return failed(fmt.Errorf("input: %w", err))
	}
	return p.evaluate(input, nil)
}

func failed(err error) decision {
	r := Reason{Text: err.Error(), Kind: ReasonError}
	var e *topdown.Error
	if errors.As(err, &e) {
		r.Text = e.Message
		if e.Location != nil {
			r.File, r.Line = e.Location.File, e.Location.Row
		}
	}
	return decision{Error: &r}
}

// evaluate is the hot path: the query is compiled, the input parsed, nothing
// is measured, and nothing traced unless a tracer is given.
func (p *program) evaluate(input *ast.Term, tracer *explainer) decision {
	if len(p.query) == 0 {
		return decision{}
	}
	q := topdown.NewQuery(p.query).
		WithQueryCompiler(p.queryC).
		WithCompiler(p.compiler).
		WithStore(p.store).
		WithTransaction(p.txn).
		WithInput(input).
		WithMetrics(metrics.NoOp()).
		WithStrictBuiltinErrors(true)
	if tracer != nil {
		q = q.WithQueryTracer(tracer).WithIndexing(len(p.grant) > maxUnindexedTrace)
	}
	var d decision
	results := 0
	err := q.Iter(context.Background(), func(r topdown.QueryResult) error {
		results++
		return d.read(r)
	})
	switch {
	case err != nil:
		return failed(err)
	case results != 1:
		return failed(fmt.Errorf("the query has %d results", results))
	}
	return d
}

// read takes the answers apart and refuses every shape but the contract's.
func (d *decision) read(r topdown.QueryResult) error {
	for variable, term := range r {
		value := term.Value
		if rule, optional := strings.CutPrefix(string(variable), optionalAnswer); optional {
			array, ok := value.(*ast.Array)
			if !ok || array.Len() == 0 {
				continue // undefined
			}
			variable, value = ast.Var(rule), array.Elem(0).Value
		}
		var err error
		switch variable {
		case "allow":
			b, ok := value.(ast.Boolean)
			if !ok {
				return fmt.Errorf("allow must be a boolean, not %s", ast.ValueName(value))
			}
			d.Allow = bool(b)
		case "deny":
			d.Deny, err = messages("deny", value)
		case "ask":
			d.Ask, err = messages("ask", value)
		case "limits":
			err = d.readLimits(value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func messages(rule string, value ast.Value) ([]string, error) {
	set, ok := value.(ast.Set)
	if !ok {
		return nil, fmt.Errorf("%s must be a set of strings, not %s", rule, ast.ValueName(value))
	}
	if set.Len() > maxMessages {
		return nil, fmt.Errorf("%s has %d elements; %d are allowed", rule, set.Len(), maxMessages)
	}
	out := make([]string, 0, set.Len())
	err := set.Iter(func(term *ast.Term) error {
		s, ok := term.Value.(ast.String)
		if !ok {
			return fmt.Errorf("%s must be a set of strings; one of its elements is %s", rule, ast.ValueName(term.Value))
		}
		out = append(out, bounded(string(s)))
		return nil
	})
	return out, err
}

func bounded(s string) string {
	if len(s) <= maxMessageBytes {
		return s
	}
	s = s[:maxMessageBytes]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s + "…"
}

func (d *decision) readLimits(value ast.Value) error {
	set, ok := value.(ast.Set)
	if !ok {
		return fmt.Errorf("limits must be a set of objects, not %s", ast.ValueName(value))
	}
	return set.Iter(func(term *ast.Term) error {
		object, ok := term.Value.(ast.Object)
		if !ok {
			return fmt.Errorf("limits must be a set of objects; one of its elements is %s", ast.ValueName(term.Value))
		}
		return object.Iter(func(key, value *ast.Term) error {
			name, ok := key.Value.(ast.String)
			if !ok {
				return errUnknownLimit(key.String())
			}
			return d.Limits.set(string(name), value.Value)
		})
	})
}

// maxUnindexedTrace is the number of rules up to which an explanation tries
// every rule, and so can say which expression of each failed. Beyond it, the
// index says only which rules cannot hold.
const maxUnindexedTrace = 200

// explain evaluates once more, traced, and adds which rules spoke.
func (p *program) explain(raw []byte) decision {
	input, err := parseInput(raw)
	if err != nil {
		return failed(fmt.Errorf("input: %w", err))
	}
	t := &explainer{said: map[spoken]*ast.Location{}, entered: map[uint64]*ast.Rule{}, failed: map[*ast.Rule]*ast.Expr{}}
	d := p.evaluate(input, t)
	if d.Error != nil {
		return d
	}
	for _, text := range d.Deny {
		d.Reasons = append(d.Reasons, t.reason(ReasonDeny, "deny", text))
	}
	switch {
	case d.Allow:
		r := Reason{Text: "an allow rule holds", Rule: "allow", Kind: ReasonAllow}
		locate(&r, t.allowed)
		d.Reasons = append(d.Reasons, r)
	default:
		d.Reasons = append(d.Reasons, p.missing(t)...)
	}
	for _, text := range d.Ask {
		d.Reasons = append(d.Reasons, t.reason(ReasonAsk, "ask", text))
	}
	return d
}

// maxMissing bounds how many allow rules are named that do not hold.
const maxMissing = 5

// missing says why there is no allow.
func (p *program) missing(t *explainer) []Reason {
	var out []Reason
	rules, tried := 0, 0
	for _, head := range p.grant {
		if head.Ref()[len(grantPackage)].Value.Compare(ast.String("allow")) != 0 || head.Default {
			continue
		}
		for rule := head; rule != nil; rule = rule.Else {
			rules++
			expr, ok := t.failed[rule]
			if !ok {
				continue
			}
			tried++
			if len(out) < maxMissing {
				r := Reason{Text: "not allowed: " + source(expr) + " does not hold", Rule: "allow", Kind: ReasonUndefined}
				locate(&r, expr.Loc())
				out = append(out, r)
			}
		}
	}
	switch {
	case rules == 0:
		return []Reason{{Text: "not allowed: there is no allow rule", Kind: ReasonUndefined}}
	case tried == 0:
		r := Reason{Text: fmt.Sprintf("not allowed: none of %d allow rules is about this request", rules), Rule: "allow", Kind: ReasonUndefined}
		if rules == 1 {
			r.Text = "not allowed: the only allow rule does not hold"
		}
		for _, head := range p.grant {
			if head.Ref()[len(grantPackage)].Value.Compare(ast.String("allow")) == 0 && !head.Default {
				locate(&r, head.Loc())
				break
			}
		}
		return []Reason{r}
	}
	return out
}

// source is an expression as its author wrote it, in one line.
func source(expr *ast.Expr) string {
	text := expr.String()
	if loc := expr.Loc(); loc != nil && len(loc.Text) > 0 {
		text = string(loc.Text)
	}
	text = oneLine(text)
	if runes := []rune(text); len(runes) > 120 {
		text = string(runes[:119]) + "…"
	}
	return text
}

func locate(r *Reason, loc *ast.Location) {
	if loc != nil {
		r.File, r.Line = loc.File, loc.Row
	}
}

// explainer is a tracer that keeps where each message came from and how far
// each allow rule got.
type explainer struct {
	said    map[spoken]*ast.Location
	allowed *ast.Location
	entered map[uint64]*ast.Rule // by the id of the query of the rule's body
	failed  map[*ast.Rule]*ast.Expr
}

type spoken struct{ rule, text string }

func (t *explainer) Enabled() bool               { return true }
func (t *explainer) Config() topdown.TraceConfig { return topdown.TraceConfig{PlugLocalVars: true} }

func (t *explainer) TraceEvent(e topdown.Event) {
	switch node := e.Node.(type) {
	case *ast.Rule:
		name := grantRule(node)
		if name == "" {
			return
		}
		switch {
		case e.Op == topdown.EnterOp && name == "allow":
			t.entered[e.QueryID] = node
		case e.Op == topdown.ExitOp && name == "allow":
			t.allowed = node.Loc()
			delete(t.failed, node)
		case e.Op == topdown.ExitOp && (name == "deny" || name == "ask"):
			t.keep(name, node, e.Locals)
		}
	case *ast.Expr:
		rule := t.entered[e.QueryID]
		if e.Op != topdown.FailOp || rule == nil {
			return
		}
		// With backtracking an expression fails many times; the one furthest
		// in is the one that mattered.
		if last := t.failed[rule]; last == nil || node.Index > last.Index {
			t.failed[rule] = node
		}
	}
}

func grantRule(rule *ast.Rule) string {
	if rule.Module == nil || !rule.Module.Package.Path.Equal(grantPackage) {
		return ""
	}
	name := rule.Head.Ref()[0].String()
	if slices.Contains(answers, name) {
		return name
	}
	return ""
}

func (t *explainer) keep(name string, rule *ast.Rule, locals *ast.ValueMap) {
	term := rule.Head.Key
	if term == nil {
		term = rule.Head.Value
	}
	value := term.Value
	if v, ok := value.(ast.Var); ok {
		if value = locals.Get(v); value == nil {
			return
		}
	}
	note := func(v ast.Value) {
		if s, ok := v.(ast.String); ok {
			key := spoken{name, bounded(string(s))}
			if t.said[key] == nil {
				t.said[key] = rule.Loc()
			}
		}
	}
	if set, ok := value.(ast.Set); ok && rule.Head.Key == nil {
		set.Foreach(func(term *ast.Term) { note(term.Value) })
		return
	}
	note(value)
}

func (t *explainer) reason(kind, rule, text string) Reason {
	r := Reason{Text: text, Rule: rule, Kind: kind}
	locate(&r, t.said[spoken{rule, text}])
	return r
}

// marshalDecision writes a reply. A decision always has a JSON form.
func marshalDecision(d decision) []byte {
	text, err := json.Marshal(d)
	if err != nil {
		text, _ = json.Marshal(failed(err))
	}
	return text
}
