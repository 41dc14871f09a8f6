package policy

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// memoryBomb doubles an array until memory ends, in a few microseconds a step.
var memoryBomb = doubling("_a", "[0, 0, 0, 0, 0, 0, 0, 0]", "array.concat(%[1]s, %[1]s)")

func doubling(name, seed, step string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "package spectrum.grant\n\nallow if input.action == \"grant\"\n\nallow if count(%s40) == 0\n\n%s0 := %s if input.action == \"grant\"\n", name, name, seed)
	b.WriteString("\ndeny contains \"never\" if count(" + name + "40) == 0\n")
	for i := 1; i <= 40; i++ {
		fmt.Fprintf(&b, "\n%s%d := %s\n", name, i, fmt.Sprintf(step, fmt.Sprintf("%s%d", name, i-1)))
	}
	return b.String()
}

// stringBomb does it with one string.
func stringBomb() string { return doubling("_s", "\"xxxxxxxx\"", "concat(\"\", [%[1]s, %[1]s])") }

// timeBomb walks a billion pairs.
const timeBomb = `package spectrum.grant

_n := [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]

allow if {
	input.action == "grant"
	some a in _n
	some b in _n
	some c in _n
	some d in _n
	some e in _n
	some f in _n
	a + b + c + d + e + f == 0
}
`

// stackBomb nests deeper than the parser's stack may grow.
func stackBomb() string {
	const depth = 90_000
	return "package spectrum.grant\n\nallow if " + strings.Repeat("[", depth) + strings.Repeat("]", depth) + " == 1\n"
}

// compileBomb is small, and takes the compiler longer than there is: the work
// grows about threefold with each level of comprehensions.
func compileBomb() string {
	nested := "1"
	for i := range 40 {
		nested = fmt.Sprintf("[x%d | some x%d in [%s]]", i, i, nested)
	}
	return allowAll + "\n_x := " + nested + "\n"
}

// TestBombs sets off each bomb in one partition's engine. Another partition's
// decisions keep answering, right and in time; the broker's own process does
// not grow; and the bomb's engine says what happened.
func TestBombs(t *testing.T) {
	// Deadlines are not stretched: that they hold is what is tested. Only the
	// neighbour's allowance is, which on a busy machine is the machine's.
	e := testEngines(t, func(o *Options) {
		o.Stretch = 1
		o.DecideTimeout = 2 * time.Second
		o.LoadTimeout = 4 * time.Second
	})
	load(t, e, HostEngine, allowAll)
	load(t, e, partitionB, allowAll+"\ndeny contains \"private\" if input.capability.resource.path == \"/private\"\n")

	var asked, slow atomic.Int64
	stop := make(chan struct{})
	var neighbour sync.WaitGroup
	neighbour.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			for path, want := range map[string]Outcome{"/photos": Allow, "/private": Deny} {
				start := time.Now()
				v := e.Decide(t.Context(), []EngineID{partitionB}, testInput(path), false)
				if v.Outcome != want {
					t.Errorf("the neighbour's decision about %s: %s", path, v.Summary())
				}
				if time.Since(start) > time.Second {
					slow.Add(1)
				}
				asked.Add(1)
			}
		}
	})
	defer func() {
		close(stop)
		neighbour.Wait()
		if asked.Load() < 20 || slow.Load() > 0 {
			t.Errorf("the neighbour was asked %d times, %d of them slow", asked.Load(), slow.Load())
		}
	}()
	before := residentBytes(t)

	t.Run("decide", func(t *testing.T) {
		for name, c := range map[string]struct{ rego, want string }{
			// Near its limit a worker may be busy collecting garbage until the
			// deadline; either way it is gone.
			"memory":        {memoryBomb, ""},
			"string memory": {stringBomb(), "ran out of memory"},
			"time":          {timeBomb, "the decision took longer than 2s and was stopped"},
		} {
			t.Run(name, func(t *testing.T) {
				load(t, e, partitionA, c.rego)
				start := time.Now()
				v := decide(t, e, partitionA)
				if v.Outcome != Deny || v.Answers[1].Outcome != Error || !strings.Contains(v.Summary(), c.want) {
					t.Errorf("%s: %s", v.Outcome, v.Summary())
				}
				if took := time.Since(start); took > 8*time.Second {
					t.Errorf("it took %s", took)
				}
			})
		}
	})
	t.Run("load", func(t *testing.T) {
		load(t, e, partitionA, allowAll)
		for name, c := range map[string]struct{ rego, want string }{
			"stack":        {stackBomb(), "ran out of stack"},
			"compile time": {compileBomb(), "loading took longer than 4s and was stopped"},
			"host file":    {"package spectrum.grant\n\nallow if json.match_schema({}, {\"$ref\": \"file:///etc/passwd\"})[0]\n", "built-in json.match_schema is not allowed"},
			"annotation":   {"# METADATA\n# scope: package\n# schemas:\n#   - input: {\"$ref\": \"file:///etc/passwd\"}\npackage spectrum.grant\n\nallow if json.verify_schema({\"$ref\": \"file:///etc/passwd\"})[0]\n", "built-in json.verify_schema is not allowed"},
			"shift":        {"package spectrum.grant\n\nallow if bits.lsh(1, 20000000000) > 0\n", "built-in bits.lsh is not allowed"},
			"parser":       {"package spectrum.grant\n\nallow if rego.parse_module(\"a\", input.action)\n", "built-in rego.parse_module is not allowed"},
		} {
			t.Run(name, func(t *testing.T) {
				start := time.Now()
				_, err := e.Load(t.Context(), partitionA, sources(c.rego))
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("load: %v", err)
				}
				t.Log(err)
				if took := time.Since(start); took > 12*time.Second {
					t.Errorf("it took %s", took)
				}
				if v := decide(t, e, partitionA); v.Outcome != Allow {
					t.Errorf("the last good revision: %s", v.Summary())
				}
			})
		}
	})

	if grown := residentBytes(t) - before; grown > 64<<20 && !raceDetector {
		t.Errorf("the broker grew by %d MiB", grown>>20)
	}
}

func residentBytes(t testing.TB) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	rss, err := statmField(text, 1)
	if err != nil {
		t.Fatal(err)
	}
	return int64(rss)
}
