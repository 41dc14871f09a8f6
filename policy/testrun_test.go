package policy

import (
	"slices"
	"strings"
	"testing"
)

// TestRunTests: a test passes only if the broker's own contract holds for it,
// and what failed is said with its place.
func TestRunTests(t *testing.T) {
	src := Sources{
		Dir: "p", Data: []byte(`{"vms": ["a"]}`), DataName: "data.json",
		Files: map[string][]byte{
			"a.rego": []byte(`package spectrum.grant

import data.spectrum.lib.vms

allow if vms.labelled(input.holder, "app", "editor")

deny contains concat("", [input.action, "!"]) if to_number(input.holder.vm) > 1
`),
			"a_test.rego": []byte(`package spectrum.grant_test

import data.spectrum.grant

editor := {"holder": {"own": {"labels": {"app": "editor"}}}}

test_library if grant.allow with input as editor

test_data if "a" in data.partition.vms

test_far if {
	x := 1
	x == 1
	some v in [1, 2, 3]
	v > x
	grant.allow with input as {"holder": {"own": {"labels": {"app": "mail"}}}}
	x == 2
}

test_builtin_error if count(grant.deny) == 0 with input as {"action": "grant", "holder": {"vm": "x"}}

test_case[name] if {
	some name, n in {"one": 1, "two": 2}
	n == 1
}

test_slow if {
	some a in numbers
	some b in numbers
	some c in numbers
	some d in numbers
	a + b + c + d == 1
}

numbers := [n | some i in [0, 100, 200, 300, 400, 500]; some j in [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]; n := i + j]

todo_test_later if false

test_after_slow if {
	print("an", "output")
	true
}
`),
		},
	}
	report := runTests(testRequest{Sources: src})
	if len(report.Findings) > 0 {
		t.Fatal(report.Findings)
	}
	want := []TestResult{
		{Name: "test_library", Line: 7, Outcome: TestPassed},
		{Name: "test_data", Line: 9, Outcome: TestPassed},
		{
			Name: "test_far", Line: 11, Outcome: TestFailed, DetailFile: "p/a_test.rego", DetailLine: 16,
			Detail: `grant.allow with input as {"holder": {"own": {"labels": {"app": "mail"}}}} does not hold`,
		},
		{
			Name: "test_builtin_error", Line: 20, Outcome: TestError, DetailFile: "p/a.rego", DetailLine: 7,
			Detail: `to_number: strconv.ParseFloat: parsing "x": invalid syntax`,
		},
		{
			Name: "test_case", Line: 22, Outcome: TestFailed, DetailFile: "p/a_test.rego", DetailLine: 24,
			Detail: "n == 1 does not hold (cases: two)",
		},
		{Name: "test_slow", Line: 27, Outcome: TestError, Detail: "it takes longer than 1s"},
		{Name: "todo_test_later", Line: 37, Outcome: TestSkipped},
		{Name: "test_after_slow", Line: 39, Outcome: TestPassed, Output: "an output"},
	}
	for i := range want {
		want[i].File, want[i].Name = "p/a_test.rego", "data.spectrum.grant_test."+want[i].Name
	}
	if !slices.Equal(report.Results, want) {
		for i, r := range report.Results {
			t.Errorf("%d: got %+v", i, r)
		}
	}
	if r := runTests(testRequest{src, "_data$"}).Results; len(r) != 1 || r[0] != want[1] {
		t.Errorf("chosen by name: %+v", r)
	}

	src.Files["a_test.rego"] = []byte("package spectrum.grant_test\n\ntest_now if time.now_ns() > 0\n")
	report = runTests(testRequest{Sources: src})
	if len(report.Results) > 0 || len(report.Findings) != 1 ||
		!strings.Contains(report.Findings[0].String(), "p/a_test.rego:3:13: built-in time.now_ns is not allowed") {
		t.Errorf("a built-in that policies may not call: %+v", report)
	}
}
