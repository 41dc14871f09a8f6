package policy

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
)

// TestResult is the outcome of one test_ rule of a policy.
type TestResult struct {
	Name    string `json:"name"` // package.rule
	File    string `json:"file"`
	Line    int    `json:"line"`
	Outcome string `json:"outcome"`          // pass | fail | error | skip
	Detail  string `json:"detail,omitempty"` // of a failure, with what the test printed
}

// TestReport is the outcome of all tests of a policy. Findings are set, and no
// test ran, if it does not compile.
type TestReport struct {
	Results  []TestResult `json:"results"`
	Findings []Finding    `json:"findings"`
}

// Failed counts the tests that did not pass.
func (r TestReport) Failed() int {
	n := 0
	for _, t := range r.Results {
		if t.Outcome == "fail" || t.Outcome == "error" {
			n++
		}
	}
	return n
}

// check is all that can be said about sources without evaluating them.
func check(src Sources) []Finding {
	c := &compilation{src: src, tests: true}
	c.compile()
	return sortFindings(c.findings)
}

// runTests runs the test_ rules of sources under the same contract: strict,
// allowed built-ins only.
func runTests(src Sources) TestReport {
	c := &compilation{src: src, tests: true}
	c.compile()
	if hasErrors(c.findings) {
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
	results, err := tester.NewRunner().
		SetCompiler(newCompiler(set, schema, workerCapabilities(), true)).
		SetModules(fresh.modules).
		SetStore(store).
		SetParallel(1).
		CapturePrintOutput(true).
		RaiseBuiltinErrors(true).
		SetTimeout(time.Second).
		RunTests(ctx, txn)
	if err != nil {
		return fail(err)
	}
	var report TestReport
	for r := range results {
		if r != nil {
			report.Results = append(report.Results, testResult(r))
		}
	}
	slices.SortFunc(report.Results, func(a, b TestResult) int {
		if n := strings.Compare(a.File, b.File); n != 0 {
			return n
		}
		return a.Line - b.Line
	})
	return report
}

func testResult(r *tester.Result) TestResult {
	t := TestResult{Name: strings.TrimPrefix(r.Package, "data.") + "." + r.Name, Outcome: "pass"}
	if r.Location != nil {
		t.File, t.Line = r.Location.File, r.Location.Row
	}
	switch {
	case r.Error != nil:
		t.Outcome, t.Detail = "error", bounded(r.Error.Error())
	case r.Skip:
		t.Outcome = "skip"
	case r.Fail:
		t.Outcome, t.Detail = "fail", bounded(string(r.Output))
	}
	return t
}
