package sources

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

func TestDecodeVMToml(t *testing.T) {
	for _, c := range []struct {
		src  string
		line int
		says string
	}{
		{"memory_mib = 8", 1, "memory_mib: has wrong contents: 8 is not from 16"},
		{"\nvcpus = \"two\"", 2, "vcpus: has wrong contents: incompatible types"},
		{"vcpus = 999999999999999999999", 1, "out of range"},
		{"vcpus = 1.5", 1, "vcpus: has wrong contents: incompatible types"},
		{"vcpus = 1\nvcpus = 2", 2, "already been defined"},
		{"Vcpus = 1", 1, "Vcpus: has wrong contents: unknown key"},
		{"[unknown]\na = 1", 1, "unknown: has wrong contents: unknown key"},
		{"[labels]\n\"a\\nb\" = \"x\"", 1, "is not of the form"},
		{"[labels]\na = 1", 2, "incompatible types"},
		{"[labels]\na = \"\\u001b[2J\"", 1, "control characters"},
		{"role = \"../x\"", 1, "is not of the form"},
		{"[grant]\ncapability = \"x\"", 1, "incompatible types"},
		{"[[grant]]\nttl = \"1h\"", 1, "it needs a capability"},
		{"[[grant]]\ncapability = \"x\"\n\n[[grant]]\ncapability = \"y\"\nttl = \"1.5s\"\n[[grant]]\ncapability = \"z\"", 4, "[[grant]] 2: has wrong contents: ttl 1.5s is not whole seconds"},
		{"[[grant]]\ncapability = \"x\"\nttl = \"-1h\"", 1, "is not whole seconds"},
		{"[[grant]]\ncapability = \"x\"\nlabel = \"../up\"", 1, "label ../up is not of the form"},
		{"[[grant]]\ncapability = \"x\"\n[[grant]]\ncapability = \"y\"\nwhen = 1", 3, "[[grant]] 2: when: has wrong contents: unknown key"},
		{"[[grant]]\ncapability = \"x\\u0000\"", 1, "control characters"},
		{"a" + strings.Repeat(".a", MaxLine) + " = 1", 1, "a line has at most"},
		{"x = \"\xff\"", 0, "not UTF-8"},
		{strings.Repeat("[[grant]]\ncapability = \"x\"\n", MaxGrants+1), 0, "at most 128 [[grant]]"},
	} {
		_, err := decodeVMToml([]byte(c.src))
		if err == nil {
			t.Errorf("%q was taken", c.src)
			continue
		}
		line := 0
		var at *lineError
		if errors.As(err, &at) {
			line = at.line
		}
		if line != c.line || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.60q: got %v (line %d), want line %d that says %q", c.src, err, line, c.line, c.says)
		}
	}
	if c, err := decodeVMToml(nil); err != nil || c.MemoryMiB != DefaultMemoryMiB || c.VCPUs != DefaultVCPUs || c.Role != RoleApp {
		t.Errorf("empty: %+v, %v", c, err)
	}
}

// TestDecodeIsQuick: what a partition can write must not hold up a scan.
func TestDecodeIsQuick(t *testing.T) {
	deep := strings.Repeat("[", MaxLine/2)
	for name, src := range map[string]string{
		"dotted keys":  strings.Repeat("x"+strings.Repeat(".a", 500)+" = 1\n", MaxVMToml/1010),
		"tables":       strings.Repeat("["+"x"+strings.Repeat(".a", 500)+"]\n", MaxVMToml/1010),
		"nested array": "x = " + strings.Repeat(deep+"\n", MaxVMToml/(MaxLine/2+1)-1),
		"many keys":    "[labels]\n" + strings.Repeat("a=1\n", MaxVMToml/4-10),
	} {
		start := time.Now()
		_, err := decodeVMToml([]byte(src))
		if d := time.Since(start); err == nil || d > 3*time.Second {
			t.Errorf("%s (%d bytes): %v after %s", name, len(src), err, d)
		}
	}
}

func FuzzVMToml(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzVMToml")
	if err != nil || len(seeds) == 0 {
		f.Fatalf("the corpus is empty: %v", err)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		c, err := decodeVMToml(src)
		if err != nil {
			if text := err.Error(); !printable(text) || len(text) > 2000 {
				t.Errorf("an error that is not fit to print: %q", text)
			}
			return
		}
		if err := c.check(); err != nil {
			t.Errorf("taken, but %v", err)
		}
		if len(c.Grants) > MaxGrants {
			t.Errorf("%d grants", len(c.Grants))
		}
		for _, g := range c.Grants {
			if g.Capability == "" || g.TTLSeconds < 0 {
				t.Errorf("took %+v", g)
			}
		}
	})
}
