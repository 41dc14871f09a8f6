package policy

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func checked(files map[string]string) []string {
	src := Sources{Dir: "p", Files: map[string][]byte{}}
	for name, text := range files {
		src.Files[name] = []byte(text)
	}
	var got []string
	for _, f := range check(src) {
		got = append(got, f.String())
	}
	return got
}

const unindexable = "warning: rule cannot be indexed: nothing in it compares a field of input with a constant, so every request tries it"

// TestCheckSaysAll: nothing that is wrong hides anything else, and nothing is
// said of what only missed it.
func TestCheckSaysAll(t *testing.T) {
	many := strings.Builder{}
	many.WriteString("package spectrum.grant\n")
	var ofMany []string
	for i := range 2 * maxFindings {
		fmt.Fprintf(&many, "_r%d if nosuch(%d)\n", i, i)
		ofMany = append(ofMany, fmt.Sprintf("p/a.rego:%d:%d: undefined function nosuch", i+2, len(fmt.Sprintf("_r%d if ", i))+1))
	}
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"no more than can be read": {map[string]string{"a.rego": many.String()}, ofMany[:maxFindings]},
		"syntax errors of every file, and the rest of the others": {
			map[string]string{
				"a.rego": `package spectrum.grant

default allow := false

_sum(x, y) := z if {
	z := x + y
}

_flag if input.action == "grant"

_names[vm] := name if some vm, name in data.partition.vms

deny contains "no" if {
	input.action )
}
`,
				"b.rego": `package spectrum.grant

allow if {
	input.capability.kind == "fs"
	_sum(1, 2) == 3
	_names[input.holder.vm] == "x"
}

deny contains "never" if {
	_flag
	input.capability.kind == 7
}

deny contains "slow" if _flag
`,
				"c.rego": "package spectrum.grant\n\nallow {\n",
				"d.rego": "package partition.lib.d\n\nis_x(v, w) if v == w\n\nx := }\n",
				"e.rego": "package spectrum.grant\n\nimport data.partition.lib.d\n\n_x if d.is_x(1, d.x)\n",
			},
			[]string{
				`p/a.rego:14:15: unexpected ) token: expected \n or ; or }`,
				"p/b.rego:11:2: match error (left : string; right : number)",
				"p/b.rego:14:1: " + unindexable,
				"p/c.rego:4:1: unexpected eof token",
				"p/d.rego:5:6: unexpected } token: expected rule value term (e.g., x := <VALUE> { ... })",
			},
		},
		"each stage of the compiler": {
			map[string]string{"a.rego": `package spectrum.grant

import data.spectrum.lib.vms

allow if _nosuch(1)

deny contains msg if input.action == "grant"

ask contains "why?" if http.send({"url": 1}).status == "x"

ask contains "what?" if startswith(5, input.action)

_a if _b

_b if _a

_c := 1

_c contains 2

default _d := 1

default _d := 2

_e if {
	x := 1
}

limits contains {"max_uses": 1} if regex.match("x", input.holder.vm)

limits contains {"max_uses": "x"}
`},
			[]string{
				"p/a.rego:3:1: import data.spectrum.lib.vms unused",
				"p/a.rego:5:10: undefined function _nosuch",
				"p/a.rego:7:15: var msg is unsafe",
				"p/a.rego:9:1: " + unindexable,
				"p/a.rego:9:24: built-in http.send is not allowed in policies",
				"p/a.rego:11:1: " + unindexable,
				"p/a.rego:11:25: startswith: invalid argument(s) (have: (number, string); want: (search: string, base: string, result: boolean))",
				"p/a.rego:13:1: rule data.spectrum.grant._a is recursive: data.spectrum.grant._a -> data.spectrum.grant._b -> data.spectrum.grant._a",
				"p/a.rego:15:1: rule data.spectrum.grant._b is recursive: data.spectrum.grant._b -> data.spectrum.grant._a -> data.spectrum.grant._b",
				"p/a.rego:17:1: conflicting rules data.spectrum.grant._c found",
				"p/a.rego:23:1: _d has a default already, in line 21 of p/a.rego",
				"p/a.rego:26:2: assigned var x unused",
				"p/a.rego:29:1: " + unindexable,
				"p/a.rego:31:1: " + unindexable,
				"p/a.rego:31:30: limit max_uses must be a number, not string",
			},
		},
		"a broken file does not excuse what it cannot have caused": {
			map[string]string{
				"a.rego": "package spectrum.grant\n\nallow if {\n",
				"b.rego": "package spectrum.grant\n\ndeny contains 1\n\n_x if startwith(\"a\", \"b\")\n",
			},
			[]string{
				"p/a.rego:4:1: unexpected eof token",
				"p/b.rego:3:1: deny must be a set of strings, not set[number]",
				"p/b.rego:5:7: undefined function startwith",
			},
		},
		"values of a type that the field never has": {
			map[string]string{"a.rego": `package spectrum.grant

_label if input.holder.own.labels[_] == 5

_some if {
	some label in input.holder.own.labels
	label == true
}

_key if input.holder.own.labels[1] == "x"

_partition if input.holder.partition == 5

_parent if input.parent.kind == 7

_rights if "read" == input.capability.rights

_in if 5 in input.holder.ancestors

_null if input.action == null

_ttl if input.capability.ttl_seconds > "3600"

_not if not input.parent.kind != 7

_each if input.holder.own.labels.app < 5

_fine if {
	input.parent != null
	input.holder.partition != null
	input.holder.own.labels.app != "x"
	input.capability.ttl_seconds > 5
	x := input.capability.ttl_seconds
	x > 5
	some i
	input.capability.rights[i] != "write"
	input.capability.kind > 5 with input as {"capability": {"kind": 7}}
}
`},
			[]string{
				"p/a.rego:3:11: match error (left : string; right : number)",
				"p/a.rego:7:2: match error (left : string; right : boolean)",
				"p/a.rego:10:9: undefined ref: input.holder.own.labels[1] (have: 1; want (type): string)",
				"p/a.rego:12:15: match error (left : any<null, string>; right : number)",
				"p/a.rego:14:12: match error (left : string; right : number)",
				"p/a.rego:16:12: match error (left : string; right : array[string])",
				"p/a.rego:18:8: match error (left : number; right : string)",
				"p/a.rego:20:10: match error (left : string; right : null)",
				`p/a.rego:22:9: warning: input.capability.ttl_seconds > "3600" compares a number with a string, and so says nothing of either`,
				"p/a.rego:24:9: warning: input.parent.kind != 7 compares a string with a number, and so says nothing of either",
				"p/a.rego:26:10: warning: input.holder.own.labels.app < 5 compares a string with a number, and so says nothing of either",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := checked(c.files); !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

// TestCheckBlamesNoOther breaks every line of a file in turn: nothing is said
// of another that uses what is in it, and a policy loads just if it is checked
// to.
func TestCheckBlamesNoOther(t *testing.T) {
	helpers := `package spectrum.grant

import data.partition.lib.d

default _mode := "none"

_mode := "strict" if input.capability.kind == "fs"

_sum(x, y) := z if {
	z := x + y
}

_flag if {
	input.action == "grant"
	d.ok(input.holder)
}

_names[vm] := name if name := data.partition.vms[vm]

_tags contains tag if {
	some tag in input.holder.own.names
	startswith(tag, "x")
}

deny contains sprintf("no %s", [input.action]) if input.action == "spawn"
`
	user := `package spectrum.grant

allow if {
	input.capability.kind == "fs"
	_sum(1, 2) == 3
	_names[input.holder.vm] == "x"
	_mode == "strict"
	not _flag
}

deny contains "never" if {
	input.action == "grant"
	"x" in _tags
}

limits contains {"max_uses": _sum(1, 2)} if input.action == "grant"
`
	lines := strings.Split(strings.TrimSpace(helpers), "\n")
	broken := 0
	for i, line := range lines {
		for _, with := range []string{line[:len(line)/2], line + " )", "} " + line, line + "\n{", strings.Replace(line, " ", " := ", 1)} {
			mangled := slices.Clone(lines)
			mangled[i] = with
			src := Sources{Dir: "p", Files: map[string][]byte{
				"a.rego": []byte(strings.Join(mangled, "\n")), "b.rego": []byte(user),
				"d.rego": []byte("package partition.lib.d\n\nok(h) if h.disposable\n"),
			}}
			findings := check(src)
			if p, _ := compile(src); (p == nil) != hasErrors(findings) {
				t.Errorf("line %d as %q: it loads: %t, and check says %v", i+1, with, p != nil, findings)
			}
			c := &compilation{src: src}
			if c.parse(); !c.unparsed {
				continue
			}
			broken++
			for _, f := range findings {
				if f.File != "p/a.rego" {
					t.Errorf("line %d as %q: %s", i+1, with, f)
				}
			}
		}
	}
	if broken < 60 {
		t.Errorf("only %d of the files do not parse", broken)
	}
}

// A rule that another stands in for never decides, whoever forgot to say so.
func TestStandInDecidesNothing(t *testing.T) {
	c := &compilation{standIns: map[place]bool{{"p.rego", 3}: true}}
	if !c.failed() || !strings.Contains(c.findings[0].Message, "not compiled as it is written") {
		t.Errorf("it may decide: %v", c.findings)
	}
	if c = (&compilation{}); c.failed() {
		t.Errorf("what is whole is refused: %v", c.findings)
	}
	for name, text := range map[string]string{
		"a type error":       "package spectrum.grant\n\nallow if input.capability.kind == 7\n",
		"an unsafe variable": "package spectrum.grant\n\nallow if x\n",
		"a syntax error":     "package spectrum.grant\n\nallow if {\n",
	} {
		p, findings := compile(Sources{Files: map[string][]byte{"p.rego": []byte(text)}, Dir: "p"})
		if p != nil || !hasErrors(findings) {
			t.Errorf("%s: it loads: %v", name, findings)
		}
	}
}
