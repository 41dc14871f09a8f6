package policy

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/uuid"
)

// thousandRules are 1,000 rules over 100 VMs: ten directories each.
func thousandRules() Sources {
	var b strings.Builder
	b.WriteString("package spectrum.grant\n")
	for i := range 1000 {
		fmt.Fprintf(&b, `
allow if {
	input.holder.vm == %q
	input.capability.kind == "fs"
	input.capability.resource.path == "/dir/%d"
	input.capability.rights == ["read"]
}
`, benchVM(i%100), i)
	}
	b.WriteString("\ndeny contains \"read-only\" if {\n\tinput.capability.kind == \"fs\"\n\t\"write\" in input.capability.rights\n}\n")
	b.WriteString("\nlimits contains {\"ttl_seconds\": 3600} if input.capability.kind == \"fs\"\n")
	return sources(b.String())
}

func benchVM(i int) uuid.UUID { return uuid.MustParse(fmt.Sprintf("dddddddd-0000-4000-8000-%012d", i)) }

func benchInput(id EngineID) Input {
	in := testInput("/dir/342")(id)
	in.Holder.VM = benchVM(42)
	return in
}

// BenchmarkDecideInWorker is one decision inside the worker; the target is
// 25 µs. Parsing the input, which comes before, is measured by itself.
func BenchmarkDecideInWorker(b *testing.B) {
	p := mustCompile(b, thousandRules())
	raw, err := benchInput(partitionA).as(partitionA).marshal()
	if err != nil {
		b.Fatal(err)
	}
	input, err := parseInput(raw)
	if err != nil {
		b.Fatal(err)
	}
	if d := p.evaluate(input, nil); !d.Allow || d.Error != nil || *d.Limits.TTLSeconds != 3600 {
		b.Fatalf("%+v", d)
	}
	b.Run("evaluate", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.evaluate(input, nil)
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := parseInput(raw); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("all", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			marshalDecision(p.decide(raw))
		}
	})
	b.Run("explain", func(b *testing.B) {
		for b.Loop() {
			p.explain(raw)
		}
	})
}

// BenchmarkRoundTrip is what the broker waits for one engine's decision; the
// target is 150 µs.
func BenchmarkRoundTrip(b *testing.B) {
	e := testEngines(b, nil)
	if _, err := e.Load(b.Context(), partitionA, thousandRules()); err != nil {
		b.Fatal(err)
	}
	engine := e.engines[partitionA]
	b.Run("one engine", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			in := benchInput(partitionA)
			if a := engine.decide(b.Context(), in.as(partitionA), true, false); a.Outcome != Allow {
				b.Fatalf("%+v", a)
			}
		}
		b.ReportMetric(float64(rssOf(b, e.Status()[0].PID))/(1<<20), "worker-MiB")
	})
	if _, err := e.Load(b.Context(), HostEngine, sources(allowAll)); err != nil {
		b.Fatal(err)
	}
	b.Run("with host", func(b *testing.B) {
		for b.Loop() {
			if v := e.Decide(b.Context(), []EngineID{partitionA}, benchInput, false); v.Outcome != Allow {
				b.Fatalf("%+v", v)
			}
		}
	})
}

func rssOf(t testing.TB, pid int) uint64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	rss, err := statmField(text, 1)
	if err != nil {
		t.Fatal(err)
	}
	return rss
}
