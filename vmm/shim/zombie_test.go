package shim

import (
	"errors"
	"os/exec"
	"testing"
	"time"

	"spectrum-os.org/broker/clock"
)

// A shim that has ended is gone even while nobody collects it, as when the
// first process of the machine is slow: a broker that starts must not wait for
// it to answer.
func TestDialZombie(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait() //nolint:errcheck // only to collect it
	start, err := startTime(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := clock.BootID()
	if err != nil {
		t.Fatal(err)
	}
	ident := Proc{PID: cmd.Process.Pid, Start: start, BootID: boot, Role: "shim"}
	if err := writeJSON(dir, identName, ident); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := Dial(dir)
		if errors.Is(err, ErrNoShim) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a shim that has ended and was not collected: %v, want %v", err, ErrNoShim)
		}
	}
	if _, err := startTime(cmd.Process.Pid); err != nil {
		t.Errorf("it was collected meanwhile, so that this shows nothing: %v", err)
	}
	if err := Reap(dir); err != nil {
		t.Errorf("what a zombie left cannot be cleared: %v", err)
	}
}
