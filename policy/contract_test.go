package policy

import (
	"bytes"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"spectrum-os.org/broker/policies"
)

func sources(rego string) Sources {
	return Sources{Dir: "p", Files: map[string][]byte{"a.rego": []byte(rego)}}
}

func mustCompile(t testing.TB, src Sources) *program {
	t.Helper()
	p, findings := compile(src)
	if p == nil {
		t.Fatalf("does not compile: %v", findings)
	}
	return p
}

func TestStarters(t *testing.T) {
	for _, name := range policies.Starters {
		t.Run(name, func(t *testing.T) {
			files, err := policies.WithTests(name)
			if err != nil {
				t.Fatal(err)
			}
			src := Sources{Dir: name, Files: files}
			if findings := check(src); len(findings) > 0 {
				t.Errorf("check: %v", findings)
			}
			report := runTests(testRequest{Sources: src})
			if len(report.Findings) > 0 || len(report.Results) < 5 {
				t.Errorf("findings %v, %d tests", report.Findings, len(report.Results))
			}
			for _, r := range report.Results {
				if r.Outcome != TestPassed {
					t.Errorf("%s:%d: %s: %s %s", r.File, r.Line, r.Name, r.Outcome, r.Detail)
				}
			}
		})
	}
}

// TestLoadRefuses holds every error that §6 of the design wants at load, by
// its words and its place.
func TestLoadRefuses(t *testing.T) {
	for name, c := range map[string]struct{ rego, want string }{
		"syntax":              {"package spectrum.grant\n\nallow if {", "p/a.rego:3:"},
		"misspelt rule":       {"package spectrum.grant\n\ndenny contains \"no\"", "p/a.rego:3:1: rule denny has no meaning here"},
		"misspelt package":    {"package spectrum.grants\n\nallow := true", "p/a.rego:1:1: package spectrum.grants is never asked"},
		"shipped package":     {"package spectrum.lib.paths\n\n_x := 1", "package spectrum.lib.paths is shipped"},
		"bare helper package": {"package partition.lib\n\nx := 1", "is never asked"},
		"deny boolean":        {"package spectrum.grant\n\ndeny := true", "p/a.rego:3:1: deny must be a set of strings, not boolean"},
		"deny array":          {"package spectrum.grant\n\ndeny := [\"no\"]", "deny must be a set of strings, not array"},
		"deny numbers":        {"package spectrum.grant\n\ndeny contains 1", "deny must be a set of strings, not set[number]"},
		"deny object":         {"package spectrum.grant\n\ndeny[\"x\"] := \"y\"", "deny must be a set of strings, not an object"},
		"deny function":       {"package spectrum.grant\n\ndeny(x) := x", "deny must be a set of strings, not a function"},
		"allow set":           {"package spectrum.grant\n\nallow contains \"yes\"", "allow must be a boolean, not a set"},
		"allow string":        {"package spectrum.grant\n\nallow := \"yes\"", "allow must be a boolean, not string"},
		"ask string":          {"package spectrum.grant\n\nask := \"why?\"", "ask must be a set of strings, not string"},
		"unknown limit":       {"package spectrum.grant\n\nlimits contains {\"ttl\": 1}", "unknown limit ttl"},
		"negative limit":      {"package spectrum.grant\n\nlimits contains {\"ttl_seconds\": -1}", "limit ttl_seconds is -1: it must not be negative"},
		"fractional limit":    {"package spectrum.grant\n\nlimits contains {\"max_uses\": 1.5}", "limit max_uses is 1.5: it must be a whole number"},
		"huge limit":          {"package spectrum.grant\n\nlimits contains {\"max_uses\": 1e99}", "it is too large"},
		"string limit":        {"package spectrum.grant\n\nlimits contains {\"max_uses\": \"3\"}", "limit max_uses must be a number, not string"},
		"number read_only":    {"package spectrum.grant\n\nlimits contains {\"read_only\": 1}", "limit read_only must be a boolean, not number"},
		"limit from a field":  {"package spectrum.grant\n\nlimits contains {\"max_uses\": input.action}", "limit max_uses must be a number, not string"},
		"limit in a literal":  {"package spectrum.grant\n\nlimits := {{\"max_use\": 1}}", "unknown limit max_use"},
		"limits array":        {"package spectrum.grant\n\nlimits contains [1]", "limits must be a set of objects"},
		"misspelt field":      {"package spectrum.grant\n\nallow if input.capability.knd == \"fs\"", "undefined ref: input.capability.knd"},
		"misspelt in parent":  {"package spectrum.grant\n\nallow if input.parent.knd == \"fs\"", "no field \"knd\" (have: kind, resource, rights, ttl_seconds)"},
		"field of a resource": {"package spectrum.grant\n\nallow if input.capability.resource.pth == \"/\"", "undefined ref: input.capability.resource.pth"},
		"wrong type":          {"package spectrum.grant\n\nallow if input.holder.disposable == \"yes\"", "match error"},
		"other data":          {"package spectrum.grant\n\nallow if data.partitions.x", "a policy reads its own data as data.partition"},
		"http.send":           {"package spectrum.grant\n\nallow if http.send({}).status == 200", "p/a.rego:3:10: built-in http.send is not allowed"},
		"json.match_schema":   {"package spectrum.grant\n\nallow if json.match_schema({}, {\"$ref\": \"file:///etc/passwd\"})[0]", "built-in json.match_schema is not allowed"},
		"rego.parse_module":   {"package spectrum.grant\n\nallow if {\n\tx := rego.parse_module(\"x\", \"y\")\n\tx == 1\n}", "p/a.rego:4:7: built-in rego.parse_module is not allowed"},
		"bits.lsh":            {"package spectrum.grant\n\nallow if bits.lsh(1, 20000000000) > 0", "built-in bits.lsh is not allowed"},
		"time.now_ns":         {"package spectrum.grant\n\nallow if time.now_ns() > 0", "built-in time.now_ns is not allowed"},
		"unused variable":     {"package spectrum.grant\n\nallow if {\n\tx := 1\n}", "assigned var x unused"},
		"recursion":           {"package spectrum.grant\n\nallow if _a\n\n_a if allow", "recursive"},
		"empty file":          {"", "p/a.rego:1:1: empty module"},
		"v0 syntax":           {"package spectrum.grant\n\nallow { true }", "`if` keyword is required"},
	} {
		t.Run(name, func(t *testing.T) {
			_, findings := compile(sources(c.rego))
			var all []string
			for _, f := range findings {
				if f.Severity == SeverityError {
					all = append(all, f.String())
				}
			}
			if got := strings.Join(all, "\n"); !strings.Contains(got, c.want) {
				t.Errorf("want %q in\n%s", c.want, got)
			}
		})
	}
}

func TestParseInput(t *testing.T) {
	raw, err := testInput("/a \u00e9\u2028\"\\")(partitionA).as(partitionA).marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseInput(raw)
	if err != nil {
		t.Fatal(err)
	}
	want, err := ast.ValueFromReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if got.Value.Compare(want) != 0 {
		t.Errorf("got %s, want %s", got, want)
	}
	if _, err := parseInput([]byte(`{"a":`)); err == nil {
		t.Error("half an input is parsed")
	}
}
