package policy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Outcomes of a test.
const (
	TestPassed  = "pass"
	TestFailed  = "fail"
	TestError   = "error"   // it could not be evaluated
	TestSkipped = "skipped" // its name begins with todo_test_
)

// TestResult is the outcome of one test_ rule of a policy.
type TestResult struct {
	Name    string `json:"name"` // data.package.rule
	File    string `json:"file"`
	Line    int    `json:"line"`
	Outcome string `json:"outcome"`
	// What did not hold, or the error, and where if that is known.
	Detail     string `json:"detail,omitempty"`
	DetailFile string `json:"detail_file,omitempty"`
	DetailLine int    `json:"detail_line,omitempty"`
	Output     string `json:"output,omitempty"` // of print
}

// Failed tells whether the test did not pass, and was not skipped.
func (t TestResult) Failed() bool { return t.Outcome == TestFailed || t.Outcome == TestError }

// TestReport is the outcome of all tests of a policy. Findings are set, and no
// test ran, if it does not compile.
type TestReport struct {
	Results  []TestResult `json:"results"`
	Findings []Finding    `json:"findings"`
}

// testRequest is what a worker is to test: the tests whose full name the
// regular expression matches, or all if it is empty.
type testRequest struct {
	Sources
	Run string `json:"run"`
}

// testTimeout is for one test, which may ask for several decisions.
const testTimeout = time.Second

// check is all that can be said about sources without evaluating them.
func check(src Sources) []Finding {
	c := &compilation{src: src, tests: true}
	c.compile()
	return sortFindings(c.findings)
}

// runTests runs the test_ rules of sources under the same contract: strict,
// allowed built-ins only.
func runTests(req testRequest) TestReport {
	src := req.Sources
	c := &compilation{src: src, tests: true}
	c.compile()
	if c.failed() {
		return TestReport{Findings: sortFindings(c.findings)}
	}
	fail := func(err error) TestReport {
		c.reportAST(err)
		return TestReport{Findings: sortFindings(c.findings)}
	}
	set, err := schemaSet()
	if err != nil {
		return fail(err)
	}
	schema, err := parseInputSchema()
	if err != nil {
		return fail(err)
	}
	object, err := ast.JSON(c.data)
	if err != nil {
		return fail(err)
	}
	doc, ok := object.(map[string]any)
	if !ok {
		return fail(errors.New("data is not an object"))
	}
	// The runner compiles by itself, with stages of its own added; parsing
	// anew gives it modules that were not compiled yet.
	fresh := &compilation{src: src, tests: true}
	fresh.parse()
	ctx := context.Background()
	store := inmem.NewFromObject(doc)
	txn, err := store.NewTransaction(ctx)
	if err != nil {
		return fail(err)
	}
	defer store.Abort(ctx, txn)
	trace := &failures{entered: map[uint64]*ast.Rule{}, failed: map[place]*ast.Expr{}}
	results, err := tester.NewRunner().
		SetCompiler(newCompiler(set, schema, workerCapabilities(), true)).
		SetModules(fresh.modules).
		SetStore(store).
		SetParallel(1).
		CapturePrintOutput(true).
		RaiseBuiltinErrors(true).
		SetTimeout(testTimeout).
		SetCoverageQueryTracer(trace).
		Filter(req.Run).
		RunTests(ctx, txn)
	if err != nil {
		return fail(err)
	}
	var finished []*tester.Result
	for r := range results {
		finished = append(finished, r)
	}
	var report TestReport
	for _, r := range finished {
		report.Results = append(report.Results, testResult(r, trace.failed[placeOf(r.Location)]))
	}
	slices.SortFunc(report.Results, func(a, b TestResult) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), strings.Compare(a.Name, b.Name))
	})
	return report
}

func testResult(r *tester.Result, failed *ast.Expr) TestResult {
	t := TestResult{
		Name: r.Package + "." + r.Name, Outcome: TestPassed, File: r.Location.File, Line: r.Location.Row,
		Output: bounded(strings.TrimRight(string(r.Output), "\n")),
	}
	switch {
	case r.Error != nil:
		t.Outcome = TestError
		var evaluation *topdown.Error
		switch {
		case topdown.IsCancel(r.Error):
			t.Detail = fmt.Sprintf("it takes longer than %s", testTimeout)
		case errors.As(r.Error, &evaluation) && evaluation.Location != nil:
			t.Detail, t.DetailFile, t.DetailLine = evaluation.Message, evaluation.Location.File, evaluation.Location.Row
		default:
			t.Detail = r.Error.Error()
		}
	case r.Skip:
		t.Outcome = TestSkipped
	case r.Fail:
		t.Outcome = TestFailed
		if failed != nil {
			t.Detail, t.DetailFile, t.DetailLine = source(failed)+" does not hold", failed.Location.File, failed.Location.Row
		}
		var cases []string
		for name, sub := range r.SubResults.Iter {
			if sub.Fail {
				cases = append(cases, strings.Join(name, "/"))
			}
		}
		if len(cases) > 0 {
			t.Detail = strings.TrimSpace(t.Detail + " (cases: " + strings.Join(cases, ", ") + ")")
		}
	}
	t.Detail = bounded(t.Detail)
	return t
}

// failures is a tracer that keeps how far each test got: the last expression
// that did not hold, by the test's rule. Query ids start anew with each test.
type failures struct {
	entered map[uint64]*ast.Rule
	failed  map[place]*ast.Expr
}

func (*failures) Enabled() bool { return true }

func (*failures) Config() topdown.TraceConfig { return topdown.TraceConfig{} }

func (f *failures) TraceEvent(e topdown.Event) {
	switch node := e.Node.(type) {
	case *ast.Rule:
		if e.Op == topdown.EnterOp {
			f.entered[e.QueryID] = node
		}
	case *ast.Expr:
		rule := f.entered[e.QueryID]
		if e.Op != topdown.FailOp || rule == nil ||
			!slices.ContainsFunc(rule.Body, func(expr *ast.Expr) bool { return expr.Location == node.Location }) {
			return
		}
		at := placeOf(rule.Loc())
		if last := f.failed[at]; last == nil || node.Index >= last.Index {
			f.failed[at] = node
		}
	}
}
