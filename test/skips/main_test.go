package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestReportAndJudge(t *testing.T) {
	events := `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: no /dev/kvm\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP: TestA (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestB","Output":"noise\n"}
{"Action":"pass","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"pass","Package":"p","Elapsed":1.5}
`
	var out bytes.Buffer
	r := &report{out: &out, output: map[testID][]string{}}
	if err := r.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "ok  \tp\t1.500s\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
	if len(r.skipped) != 1 || r.skipped[0].why != "a_test.go:1: no /dev/kvm" {
		t.Fatalf("skips: %+v", r.skipped)
	}
	allowed := map[testID]string{{"p", "TestA"}: "needs hardware"}
	for _, c := range []struct {
		allowed map[testID]string
		strict  bool
		want    int
	}{{nil, true, 1}, {nil, false, 0}, {allowed, true, 0}} {
		if got := judge(&out, r.skipped, c.allowed, c.strict); got != c.want {
			t.Errorf("judge(%v, strict %v) = %d, want %d", c.allowed, c.strict, got, c.want)
		}
	}
}

func TestReportShowsFailures(t *testing.T) {
	events := `{"Action":"output","Package":"p","Test":"TestA","Output":"it broke\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`
	var out bytes.Buffer
	r := &report{out: &out, output: map[testID][]string{}}
	if err := r.read(strings.NewReader(events)); err != nil {
		t.Fatal(err)
	}
	if !r.failed || out.String() != "it broke\nFAIL\tp\t0.1s\n" {
		t.Errorf("failed %v, printed %q", r.failed, out.String())
	}
}

func TestParseAllowedWantsAReason(t *testing.T) {
	if _, err := parseAllowed(strings.NewReader("p TestA\n")); err == nil {
		t.Error("a line without a reason was taken")
	}
}

func FuzzParseAllowed(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		allowed, err := parseAllowed(bytes.NewReader(b))
		if err != nil {
			return
		}
		for id, reason := range allowed {
			if id.pkg == "" || id.test == "" || reason == "" {
				t.Fatalf("took %v: %q", id, reason)
			}
		}
	})
}
