package policy

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func decide(t testing.TB, e *Engines, ids ...EngineID) Verdict {
	t.Helper()
	return e.Decide(t.Context(), ids, testInput("/photos"), false)
}

func TestDecide(t *testing.T) {
	e := testEngines(t, nil)
	const deny = "package spectrum.grant\n\nallow := true\n\ndeny contains msg if {\n\tinput.capability.kind == \"fs\"\n\tmsg := sprintf(\"not %s\", [input.capability.resource.path])\n}\n"
	for name, c := range map[string]struct {
		host, partition string
		ids             []EngineID
		want            Outcome
		summary         string
	}{
		"both allow":           {allowAll, allowAll, []EngineID{HostEngine, partitionA}, Allow, "allowed by the policy of host: an allow rule holds (allow, p/a.rego:3)"},
		"host need not allow":  {"package spectrum.grant\n", allowAll, []EngineID{partitionA}, Allow, "aaaaaaaa-0000-4000-8000-000000000001: allow, p/a.rego:3"},
		"host must allow":      {"package spectrum.grant\n", allowAll, []EngineID{HostEngine, partitionA}, Deny, "denied by the policy of host: not allowed: there is no allow rule"},
		"host denies":          {deny, allowAll, []EngineID{partitionA}, Deny, "denied by the policy of host: not /photos (deny, p/a.rego:5)"},
		"partition denies":     {allowAll, deny, []EngineID{partitionA}, Deny, "denied by the policy of aaaaaaaa-0000-4000-8000-000000000001: not /photos (deny, p/a.rego:5)"},
		"partition undefined":  {allowAll, "package spectrum.grant\n\nallow if {\n\tinput.action == \"grant\"\n\tinput.capability.kind == \"usb\"\n}\n", []EngineID{partitionA}, Deny, "denied by the policy of aaaaaaaa-0000-4000-8000-000000000001: not allowed: input.capability.kind == \"usb\" does not hold (allow, p/a.rego:5)"},
		"ask":                  {allowAll, "package spectrum.grant\n\nallow := true\n\nask contains \"really?\"\n", []EngineID{partitionA}, Ask, "nobody was asked what the policy of aaaaaaaa-0000-4000-8000-000000000001 wants answered: really? (ask, p/a.rego:5)"},
		"ask is not allow":     {allowAll, "package spectrum.grant\n\nask contains \"really?\"\n", []EngineID{partitionA}, Deny, "there is no allow rule"},
		"host asks":            {"package spectrum.grant\n\nask contains \"sure?\"\n", allowAll, []EngineID{partitionA}, Ask, "the policy of host wants answered: sure?"},
		"run-time error":       {allowAll, "package spectrum.grant\n\nallow := true\n\ndeny contains \"x\" if to_number(input.action) > 1\n", []EngineID{partitionA}, Deny, "invalid syntax (p/a.rego:5)"},
		"run-time limit":       {allowAll, "package spectrum.grant\n\nallow := true\n\nlimits contains {\"max_uses\": n} if n := count(input.holder.ancestors) - 1\n", []EngineID{partitionA}, Deny, "limit max_uses is -1: it must not be negative"},
		"run-time shape":       {allowAll, "package spectrum.grant\n\nallow := data.partition.a\n", []EngineID{partitionA}, Deny, "allow must be a boolean, not string"},
		"conflicting allows":   {allowAll, "package spectrum.grant\n\nallow := true if input.action == \"grant\"\n\nallow := false if input.holder.disposable == false\n", []EngineID{partitionA}, Deny, "rule data.spectrum.grant.allow produced conflicting values"},
		"false allow":          {allowAll, "package spectrum.grant\n\ndefault allow := false\n", []EngineID{partitionA}, Deny, "denied by the policy of aaaaaaaa"},
		"engine without any":   {allowAll, allowAll, []EngineID{partitionA, partitionB}, Deny, "denied by the policy of bbbbbbbb-0000-4000-8000-000000000002: it has no policy in force"},
		"helper and library":   {allowAll, "package spectrum.grant\n\nimport data.spectrum.lib.paths\n\nallow if {\n\t_mine\n\tpaths.under(input.capability, \"/photos\")\n}\n\n_mine if input.holder.own.labels.app == \"editor\"\n", []EngineID{partitionA}, Allow, "aaaaaaaa-0000-4000-8000-000000000001: allow, p/a.rego:5"},
		"own is not for hosts": {"package spectrum.grant\n\nallow if input.holder.own\n", allowAll, []EngineID{HostEngine}, Deny, "not allowed: input.holder.own does not hold (allow, p/a.rego:3)"},
	} {
		t.Run(name, func(t *testing.T) {
			load(t, e, HostEngine, c.host)
			src := sources(c.partition)
			src.Data, src.DataName = []byte(`a: "yes"`), "data.yaml"
			if _, err := e.Load(t.Context(), partitionA, src); err != nil {
				t.Fatal(err)
			}
			explain := c.want == Allow // an allow says nothing unless it is asked to
			v := e.Decide(t.Context(), c.ids, testInput("/photos"), explain)
			said := v.Summary()
			for _, a := range v.Answers {
				for _, r := range a.Reasons {
					said += "\n" + a.Name + ": " + r.At()
				}
			}
			if v.Outcome != c.want || !strings.Contains(said, c.summary) {
				t.Errorf("%s: %s\nwant %s: %s\n%+v", v.Outcome, v.Summary(), c.want, c.summary, v.Answers)
			}
		})
	}
}

func TestDecideLimits(t *testing.T) {
	e := testEngines(t, nil)
	load(t, e, HostEngine, "package spectrum.grant\n\nlimits contains {\"ttl_seconds\": 100, \"max_uses\": 7}\n\nlimits contains {\"ttl_seconds\": 1e3}\n")
	load(t, e, partitionA, "package spectrum.grant\n\nallow := true\n\nlimits contains {\"ttl_seconds\": 200, \"read_only\": true, \"max_depth\": 0}\n")
	l := decide(t, e, partitionA).Limits
	if *l.TTLSeconds != 100 || *l.MaxUses != 7 || *l.MaxDepth != 0 || !l.ReadOnly || l.MaxLive != nil || l.MaxTotal != nil {
		t.Errorf("limits %+v", l)
	}
}

func TestLoadKeepsTheLastGood(t *testing.T) {
	e := testEngines(t, nil)
	load(t, e, HostEngine, allowAll)
	if v := decide(t, e, partitionA); v.Outcome != Deny || !strings.Contains(v.Summary(), "it has no policy in force") {
		t.Errorf("before any load: %s", v.Summary())
	}
	var bad *LoadError
	if _, err := e.Load(t.Context(), partitionA, sources("package spectrum.grant\n\nallwo := true\n")); !errors.As(err, &bad) {
		t.Errorf("bad load: %v", err)
	}
	if v := decide(t, e, partitionA); v.Outcome != Deny || !strings.Contains(v.Summary(), "p/a.rego:3:1: rule allwo has no meaning here") {
		t.Errorf("never a good one: %s", v.Summary())
	}
	good := load(t, e, partitionA, allowAll)
	if _, err := e.Load(t.Context(), partitionA, sources("package spectrum.grant\n\nallow if {")); !errors.As(err, &bad) {
		t.Errorf("bad load: %v", err)
	}
	v := decide(t, e, partitionA)
	if v.Outcome != Allow || v.Answers[1].Revision != good {
		t.Errorf("after a bad load: %+v", v)
	}
	if s := e.Status()[1]; s.Revision != good || !strings.Contains(s.LastError, "p/a.rego:3:") {
		t.Errorf("status %+v", s)
	}
	e.Remove(partitionA)
	if v := decide(t, e, partitionA); v.Outcome != Deny {
		t.Errorf("after removal: %s", v.Outcome)
	}
}

func TestIdleWorkersEndAndComeBack(t *testing.T) {
	e := testEngines(t, func(o *Options) { o.Idle = 50 * time.Millisecond })
	load(t, e, HostEngine, allowAll)
	until(t, "the idle worker ends", func() bool { return e.Status()[0].PID == 0 })
	if v := decide(t, e, HostEngine); v.Outcome != Allow {
		t.Errorf("after idling: %s", v.Summary())
	}
	if s := e.Status()[0]; s.Restarts != 0 || s.LastError != "" {
		t.Errorf("idling counts as a failure: %+v", s)
	}
}

func TestKilledWorkerComesBackWithBackoff(t *testing.T) {
	e := testEngines(t, nil)
	load(t, e, HostEngine, allowAll)
	killLive := func() {
		if err := unix.Kill(e.Status()[0].PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	killLive()
	until(t, "it answers again", func() bool { return decide(t, e, HostEngine).Outcome == Allow })

	// One that dies of every question is given pauses.
	load(t, e, HostEngine, memoryBomb)
	for range 3 {
		decide(t, e, HostEngine)
	}
	v := decide(t, e, HostEngine)
	if v.Outcome != Deny || !strings.Contains(v.Summary(), "its worker starts again in") ||
		(!strings.Contains(v.Summary(), "ran out of memory") && !strings.Contains(v.Summary(), "took longer")) {
		t.Errorf("in back-off: %s", v.Summary())
	}
	if e.Status()[0].RetryAt.IsZero() {
		t.Error("status shows no back-off")
	}
	// A new revision ends the pause.
	load(t, e, HostEngine, allowAll)
	if v := decide(t, e, HostEngine); v.Outcome != Allow {
		t.Errorf("after a new revision: %s", v.Summary())
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	before := children(t)
	e := NewEngines(Options{Worker: []string{self(t), "policy-worker"}, Stretch: stretch})
	load(t, e, HostEngine, allowAll)
	load(t, e, partitionA, allowAll)
	e.Close()
	e.Close()
	if after := children(t); len(after) > len(before) {
		t.Errorf("children %v, before %v", after, before)
	}
	if v := decide(t, e, HostEngine); v.Outcome != Deny {
		t.Errorf("closed engines say %s", v.Outcome)
	}
	if _, err := e.Load(t.Context(), HostEngine, sources(allowAll)); !errors.Is(err, errClosed) {
		t.Errorf("load after close: %v", err)
	}
}

func TestLoadIsCancelled(t *testing.T) {
	e := testEngines(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := e.Load(ctx, HostEngine, sources(compileBomb()))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled load: %v", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("it took %s", d)
	}
}

func TestMissingWorkerDenies(t *testing.T) {
	e := NewEngines(Options{Worker: []string{"/nonexistent"}})
	defer e.Close()
	if _, err := e.Load(t.Context(), HostEngine, sources(allowAll)); err == nil || !strings.Contains(err.Error(), "cannot start a policy worker") {
		t.Errorf("load: %v", err)
	}
	if v := decide(t, e, HostEngine); v.Outcome != Deny {
		t.Errorf("%s", v.Outcome)
	}
}

func TestCheckAndTest(t *testing.T) {
	opts := Options{Worker: []string{self(t), "policy-worker"}, Stretch: stretch}
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a.rego", `package spectrum.grant

allow if input.capability.kid == "fs"

denny contains "no"

_slow if {
	some vm in data.partition.vms
	vm == input.holder.vm
}

deny contains "never" if not _slow

deny contains "x" if regex.match("^/x", input.capability.resource.path)

deny contains "y" if http.send({"url": input.action, "method": "get"})
`)
	write("b.rego", "package other\n")
	findings, err := Check(t.Context(), opts, dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range findings {
		got = append(got, strings.TrimPrefix(f.String(), dir+"/"))
	}
	for _, want := range []string{
		"a.rego:3:10: undefined ref: input.capability.kid",
		"a.rego:5:1: rule denny has no meaning here",
		"a.rego:16:22: built-in http.send is not allowed in policies",
		"b.rego:1:1: package other is never asked",
	} {
		if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("missing %q in\n%s", want, strings.Join(got, "\n"))
		}
	}

	// What only costs time is a warning.
	write("a.rego", `package spectrum.grant

allow := true

_slow if {
	some vm in data.partition.vms
	vm == input.holder.vm
}

deny contains "never" if not _slow

deny contains "x" if regex.match("^/x", input.capability.resource.path)

deny contains "y" if input.capability.resource.path == "/y"
`)
	write("b.rego", "package partition.lib.b\n\nx := 1\n")
	write("a_test.rego", "package spectrum.grant_test\n\nimport data.spectrum.grant\n\ntest_ok if grant.allow\n\ntest_bad if {\n\tprint(\"seen\")\n\tnot grant.allow\n}\n")
	findings, err = Check(t.Context(), opts, dir)
	if err != nil {
		t.Fatal(err)
	}
	got = nil
	for _, f := range findings {
		got = append(got, strings.TrimPrefix(f.String(), dir+"/"))
	}
	want := []string{
		"a.rego:6:2: warning: iterates over a whole collection, which no index shortens: look up by key where that is possible",
		"a.rego:10:1: warning: rule cannot be indexed: nothing in it compares a field of input with a constant, so every request tries it",
		"a.rego:12:1: warning: rule cannot be indexed: nothing in it compares a field of input with a constant, so every request tries it",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	report, err := Test(t.Context(), opts, dir, "test_(ok|bad)$")
	if err != nil {
		t.Fatal(err)
	}
	for i := range report.Results {
		r := &report.Results[i]
		r.File, r.DetailFile = strings.TrimPrefix(r.File, dir), strings.TrimPrefix(r.DetailFile, dir)
	}
	wantResults := []TestResult{
		{Name: "data.spectrum.grant_test.test_ok", File: "/a_test.rego", Line: 5, Outcome: TestPassed},
		{
			Name: "data.spectrum.grant_test.test_bad", File: "/a_test.rego", Line: 7, Outcome: TestFailed,
			Detail: "not grant.allow does not hold", DetailFile: "/a_test.rego", DetailLine: 9, Output: "seen",
		},
	}
	if !slices.Equal(report.Results, wantResults) {
		t.Errorf("got  %+v\nwant %+v", report.Results, wantResults)
	}

	write("data.json", "{}")
	write("data.yaml", "{}")
	if _, err := Check(t.Context(), opts, dir); err == nil || !strings.Contains(err.Error(), "both data.json and data.yaml") {
		t.Errorf("two data files: %v", err)
	}
	if err := os.Remove(dir + "/data.yaml"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", dir+"/c.rego"); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(t.Context(), opts, dir); err == nil || !strings.Contains(err.Error(), "c.rego is not a plain file") {
		t.Errorf("symlink: %v", err)
	}
	if err := os.Remove(dir + "/c.rego"); err != nil {
		t.Fatal(err)
	}
	write("a.rego", stackBomb())
	findings, err = Check(t.Context(), opts, dir)
	if err != nil || len(findings) != 1 || !strings.Contains(findings[0].Message, "ended its worker: it ran out of stack") {
		t.Errorf("a bomb is a finding: %v %v", findings, err)
	}
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("it does not come true that %s", what)
}

func children(t testing.TB) []string {
	t.Helper()
	if _, err := os.Stat("/proc/thread-self/children"); err != nil {
		t.Skip("MISSING: /proc/thread-self/children")
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, task := range tasks {
		if text, err := os.ReadFile("/proc/self/task/" + task.Name() + "/children"); err == nil {
			out = append(out, strings.Fields(string(text))...)
		}
	}
	return out
}
