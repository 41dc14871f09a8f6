package failpoint_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// build compiles the program that takes steps.
func build(t *testing.T, tags string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "hit")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-tags", tags, "-o", bin, "./testdata/hit").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return bin
}

func TestArmedProgram(t *testing.T) {
	bin := build(t, "failpoints")
	const whole = "one false\ntwo\none false\ntwo\n"
	for _, c := range []struct {
		name, arm, out string
		killed         bool
		refusal        string // on stderr; the program then does nothing
	}{
		{"nothing", "", whole, false, ""},
		{"kill at the first", "test.one:1:kill", "", true, ""},
		{"kill at the second", "test.two:2:kill", "one false\ntwo\none false\n", true, ""},
		{"never reached", "test.two:3:kill", whole, false, ""},
		{"sleep", "test.one:2:sleep=100ms", "one false\ntwo\none true\ntwo\n", false, ""},
		{"two at once", "test.one:1:sleep=100ms,test.two:1:kill", "one true\n", true, ""},
		{"no action", "test.one:1", "", false, `"test.one:1" is not label:count:action`},
		{"no label", ":1:kill", "", false, `":1:kill" is not label:count:action`},
		{"count", "test.one:0:kill", "", false, `the count of "test.one:0:kill" is not a number from 1`},
		{"action", "test.one:1:explode", "", false, `the action of "test.one:1:explode" is neither kill nor sleep=DURATION`},
		{"duration", "test.one:1:sleep=long", "", false, `"long" is no time to sleep`},
		{"twice", "test.one:1:kill,test.one:2:kill", "", false, `"test.one" is armed twice`},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), bin)
			cmd.Env = append(os.Environ(), "SPECTRUM_FAILPOINTS="+c.arm)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			exit, _ := errors.AsType[*exec.ExitError](err)
			killed := exit != nil && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
			if string(out) != c.out || killed != c.killed {
				t.Errorf("it printed %q and ended with %v, killed: %v; want %q, killed: %v", out, err, killed, c.out, c.killed)
			}
			if c.refusal != "" && (exit == nil || exit.ExitCode() != 2 || !strings.Contains(stderr.String(), c.refusal)) {
				t.Errorf("it ended with %v and said %q; want status 2 and %q", err, stderr.String(), c.refusal)
			}
		})
	}
}

func TestSeenLabels(t *testing.T) {
	bin := build(t, "failpoints")
	seen := filepath.Join(t.TempDir(), "seen")
	for _, arm := range []string{"", "test.two:1:kill"} {
		cmd := exec.CommandContext(t.Context(), bin)
		cmd.Env = append(os.Environ(), "SPECTRUM_FAILPOINTS="+arm, "SPECTRUM_FAILPOINTS_SEEN="+seen)
		if out, err := cmd.CombinedOutput(); (err != nil) != (arm != "") {
			t.Fatalf("%q: %v\n%s", arm, err, out)
		}
	}
	got, err := os.ReadFile(seen)
	// Once for each process, and before the label's own kill.
	if want := "test.one\ntest.two\ntest.one\ntest.two\ntest.two killed\n"; err != nil || string(got) != want {
		t.Errorf("seen: %q, %v; want %q", got, err, want)
	}
}

// Without the tag the environment means nothing.
func TestUnarmedProgram(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), build(t, ""))
	cmd.Env = append(os.Environ(), "SPECTRUM_FAILPOINTS=test.one:1:kill", "SPECTRUM_FAILPOINTS_SEEN=/nowhere/seen")
	if out, err := cmd.Output(); err != nil || string(out) != "one false\ntwo\none false\ntwo\n" {
		t.Errorf("%q, %v", out, err)
	}
}
