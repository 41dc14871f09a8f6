package labels_test

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"spectrum-os.org/broker/test/labels"
)

// A label has a dot in it: no word that a program might contain anyway is one.
var spelling = regexp.MustCompile(`^[a-z]+(\.[a-z]+)+$`)

func TestLabelsAreUnique(t *testing.T) {
	all := ofTree(t)
	at := map[string]string{}
	for _, l := range all {
		if other, twice := at[l.Name]; twice {
			t.Errorf("%s: %q is the label of %s already: one label names one place", l.At, l.Name, other)
		}
		at[l.Name] = l.At
		if !spelling.MatchString(l.Name) {
			t.Errorf("%s: %q is not spelt component.step[.before|.after]", l.At, l.Name)
		}
	}
}

func ofTree(t *testing.T) []labels.Label {
	t.Helper()
	all, err := labels.Of("../..")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 50 {
		t.Fatalf("only %d failpoints were found: the sources were not", len(all))
	}
	return all
}

func TestLabelMustBeLiteral(t *testing.T) {
	dir := t.TempDir()
	source := "package p\n\nfunc f(s string) {\n\tfailpoint.Hit(s)\n}\n"
	if err := os.WriteFile(filepath.Join(dir, "p.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := labels.Of(dir)
	if err == nil || err.Error() != "p.go:4: the label is not a string literal" {
		t.Errorf("got %v", err)
	}
}

// A release has nothing by which it could be made to die.
func TestNoneInRelease(t *testing.T) {
	all := ofTree(t)
	for _, program := range []string{"spectrum-broker", "spectrum-shim"} {
		release := build(t, program, "")
		for _, l := range all {
			if bytes.Contains(release, []byte(l.Name)) {
				t.Errorf("%s contains %q, the label of %s: it was built with failpoints, or the label means something else too and wants another name", program, l.Name, l.At)
			}
		}
		for _, variable := range []string{"SPECTRUM_FAILPOINTS", "SPECTRUM_LEDGER_SYNCHRONOUS"} {
			if bytes.Contains(release, []byte(variable)) {
				t.Errorf("%s knows %s, which is for tests", program, variable)
			}
		}
		if code := symbols(t, release); len(code) > 0 {
			t.Errorf("%s holds code of failpoints: %q", program, code)
		}
	}
	// The other build shows that these checks can find something.
	armed := build(t, "spectrum-shim", "failpoints")
	if !bytes.Contains(armed, []byte("shim.reply.before")) || !bytes.Contains(armed, []byte("SPECTRUM_FAILPOINTS")) || len(symbols(t, armed)) == 0 {
		t.Error("a shim built with failpoints shows no trace of them: this test looks in the wrong place")
	}
}

func build(t *testing.T, program, tags string) []byte {
	t.Helper()
	bin := filepath.Join(t.TempDir(), program)
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-tags", tags, "-o", bin, "../../cmd/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	body, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// symbols are the functions and variables of the package in a program.
func symbols(t *testing.T, program []byte) []string {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	all, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	var ours []string
	for _, s := range all {
		if strings.HasPrefix(s.Name, "spectrum-os.org/broker/failpoint.") {
			ours = append(ours, s.Name)
		}
	}
	return ours
}
