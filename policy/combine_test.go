package policy

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestCombineLaws holds Combine against the sentences of the design.
func TestCombineLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.Ptr(rapid.Int64Range(0, 5), true)
		answers := rapid.SliceOf(rapid.Custom(func(t *rapid.T) Answer {
			return Answer{
				Concerned: rapid.Bool().Draw(t, "concerned"),
				Outcome:   rapid.SampledFrom([]Outcome{Allow, Deny, Ask, Error, Abstain, "nonsense", ""}).Draw(t, "outcome"),
				Limits: Limits{
					TTLSeconds: limit.Draw(t, "ttl"), MaxUses: limit.Draw(t, "uses"), MaxDepth: limit.Draw(t, "depth"),
					MaxLive: limit.Draw(t, "live"), MaxTotal: limit.Draw(t, "total"), ReadOnly: rapid.Bool().Draw(t, "ro"),
				},
			}
		})).Draw(t, "answers")
		v := Combine(answers)
		has := func(match func(Answer) bool) bool { return slices.ContainsFunc(answers, match) }
		refused := len(answers) == 0 || has(func(a Answer) bool {
			return !slices.Contains([]Outcome{Allow, Ask, Abstain}, a.Outcome) || (a.Concerned && a.Outcome == Abstain)
		})
		asks := has(func(a Answer) bool { return a.Outcome == Ask })
		switch {
		case refused && v.Outcome != Deny, !refused && asks && v.Outcome != Ask, !refused && !asks && v.Outcome != Allow:
			t.Fatalf("%s of %+v", v.Outcome, answers)
		case v.Outcome == Deny:
			return
		}
		for _, a := range answers {
			for _, name := range limitNames {
				if name == "read_only" {
					if a.Limits.ReadOnly && !v.Limits.ReadOnly {
						t.Fatal("read_only is lost")
					}
					continue
				}
				if one, all := *a.Limits.field(name), *v.Limits.field(name); one != nil && (all == nil || *all > *one) {
					t.Fatalf("%s is wider than one answer's", name)
				}
			}
		}
		for i, j := 0, len(answers)-1; i < j; i, j = i+1, j-1 {
			answers[i], answers[j] = answers[j], answers[i]
		}
		if w := Combine(answers); w.Outcome != v.Outcome || mustJSON(w.Limits) != mustJSON(v.Limits) {
			t.Fatal("the order of answers matters")
		}
	})
}

func mustJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func TestSummaryIsOneLine(t *testing.T) {
	v := Combine([]Answer{{Name: "work", Outcome: Deny, Reasons: []Reason{{
		Text: "no\nallowed by the policy of host\r\x1b[2J\u2028" + strings.Repeat("x", 1000), Rule: "deny", File: "a.rego", Line: 7,
	}}}})
	s := v.Summary()
	if strings.ContainsAny(s, "\n\r\x1b\u2028") || len(s) > 500 || !strings.HasSuffix(s, "(deny, a.rego:7)") {
		t.Errorf("%q", s)
	}
}

// TestSchemaIsTheInput holds the schema and the Go type together, both ways.
func TestSchemaIsTheInput(t *testing.T) {
	schema, err := parseInputSchema()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(inputSchemaJSON), "oneOf") {
		t.Error("oneOf lets a misspelt field pass")
	}
	in := testInput("/photos")(partitionA)
	ttl, template := int64(60), holderVM
	in.Requester.VM, in.Holder.Template, in.Capability.TTLSeconds = &holderVM, &template, &ttl
	in.Parent = &in.Capability
	full, err := in.as(partitionA).marshal()
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(full, &doc); err != nil {
		t.Fatal(err)
	}
	matches(t, "input", schema, doc, true)

	var bare Input
	text, err := bare.marshal()
	if err != nil {
		t.Fatal(err)
	}
	doc = nil
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	matches(t, "input", schema, doc, false)
}

// matches wants every field of doc in the schema, every required one in doc,
// and with all every optional one too.
func matches(t *testing.T, path string, s *inputSchema, doc any, all bool) {
	t.Helper()
	for _, alt := range s.alternatives() {
		object, ok := doc.(map[string]any)
		if alt.Type != "object" || !ok || len(alt.Properties) == 0 {
			continue
		}
		for name, value := range object {
			p := alt.Properties[name]
			if p == nil {
				t.Errorf("%s.%s is not in the schema", path, name)
				continue
			}
			matches(t, path+"."+name, p, value, all)
		}
		for name := range alt.Properties {
			if _, ok := object[name]; !ok && (all || slices.Contains(alt.Required, name)) {
				t.Errorf("%s.%s is in the schema and not in the input", path, name)
			}
		}
	}
}

func TestInputReference(t *testing.T) {
	page := InputReference()
	for _, want := range []string{
		"| `input.action` | string |", "| `input.holder.own.labels` | object |", "| `input.capability.ttl_seconds` | integer, optional |",
		"| `input.parent` | null or object |", "| `input.capability.resource.path` | string |", "One of `person`, `vm`.",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not in\n%s", want, page)
		}
	}
}

// TestWorkerDiesWithTheBroker kills a broker whose worker is busy, and so not
// reading the pipe that would tell it.
func TestWorkerDiesWithTheBroker(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), self(t), "short-lived-broker")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := out.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	gone := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	end := time.Now().Add(10 * time.Second)
	for {
		n, err := unix.Poll(gone, int(time.Until(end).Milliseconds()))
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			t.Fatalf("worker %d outlives the broker: %v", pid, err)
		}
		return
	}
}
