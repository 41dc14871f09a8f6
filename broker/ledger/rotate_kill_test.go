package ledger

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// TestRotationIsKilled kills a program that rotates its ledger at every step of
// that, at each of its three rotations, and wants either what was before or what
// comes after: nothing acknowledged lost, nothing revoked alive, the chain whole
// from the first event on, and the next rotation to succeed.
func TestRotationIsKilled(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "rotate")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-tags", "failpoints", "-o", bin, "./testdata/rotate").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	story := func(dir, arm, seen string) (said string, killed bool) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), bin, dir)
		cmd.Env = append(os.Environ(), "SPECTRUM_FAILPOINTS="+arm, "SPECTRUM_FAILPOINTS_SEEN="+seen)
		out, err := cmd.Output()
		if err != nil {
			status, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if killed = status.Signal() == syscall.SIGKILL; !killed {
				t.Fatalf("%s: %v\n%s", arm, err, out)
			}
		}
		return string(out), killed
	}
	// What it passes when nobody kills it.
	seen := filepath.Join(t.TempDir(), "seen")
	if said, _ := story(filepath.Join(t.TempDir(), "s"), "", seen); strings.Count(said, "rotated") != 3 {
		t.Fatalf("it said %s", said)
	}
	labels, err := os.ReadFile(seen)
	if err != nil {
		t.Fatal(err)
	}
	steps := []string{
		"ledger.archive.begun", "ledger.archive.synced", "ledger.archive.copied", "ledger.archive.named.before",
		"ledger.archive.named.after", "ledger.rewrite.cleared", "ledger.rotate.after",
	}
	for _, s := range steps {
		if !slices.Contains(strings.Fields(string(labels)), s) {
			t.Errorf("it does not pass %s", s)
		}
	}
	for _, label := range append(steps, "ledger.insert.after", "ledger.commit.before", "ledger.commit.after") {
		for n := 1; n <= 3; n++ {
			at := n
			// Of the rotation's own transaction, before which there are 30 others each
			// time; it has one commit and two inserts.
			switch label {
			case "ledger.commit.before", "ledger.commit.after":
				at = 31 * n
			case "ledger.insert.after":
				at = 32*n - 1
			}
			arm := fmt.Sprintf("%s:%d:kill", label, at)
			t.Run(arm, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "state")
				said, killed := story(dir, arm, "")
				if !killed {
					t.Fatal("it was not killed")
				}
				survived(t, dir, said)
			})
		}
	}
}

// survived opens what a kill left and compares it with what was acknowledged.
func survived(t *testing.T, dir, said string) {
	t.Helper()
	l := open(t, dir, clock.System{})
	granted, revoked := map[uuid.UUID]bool{}, map[uuid.UUID]bool{}
	for lines := bufio.NewScanner(bytes.NewBufferString(said)); lines.Scan(); {
		what, id, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "granted":
			granted[uuid.MustParse(id)] = true
		case "revoked":
			revoked[uuid.MustParse(id)] = true
		}
	}
	if len(granted) == 0 || len(revoked) == 0 {
		t.Fatalf("it did nothing: %q", said)
	}
	check := func(when string) {
		t.Helper()
		for id := range granted {
			switch got := stateOf(l, id); {
			case revoked[id] && got != Revoking:
				t.Errorf("%s: grant %s was revoked and is %q", when, id, got)
			case !revoked[id] && got != Pending && got != Revoking: // its revocation may have been under way
				t.Errorf("%s: grant %s is %q", when, id, got)
			}
		}
		r := wholeLedger(t, dir)
		if head, _ := l.Head(); r.First != 1 || r.Last != head {
			t.Errorf("%s: verified is %+v", when, r)
		}
		for _, a := range r.Archives {
			if a.Missing {
				t.Errorf("%s: archive %s is lost", when, a.Name)
			}
		}
	}
	check("after the kill")
	noise(t, l, 1)
	rotate(t, l)
	check("after another rotation")
	// Each event is in one archive only, and nothing is left of what was broken off.
	all, err := Archives(dir)
	if err != nil {
		t.Fatal(err)
	}
	next := uint64(1)
	for _, a := range all {
		if a.First != next {
			t.Errorf("the archives are %v", all)
		}
		next = a.Last + 1
	}
	if _, err := os.Stat(filepath.Join(dir, ArchiveDir, "unfinished")); err == nil {
		t.Error("an archive that is not finished is left")
	}
}
