package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDemo runs the demo to its end, and then interrupts it at moments of the
// whole way. Nothing of it may be left.
func TestDemo(t *testing.T) {
	needTools(t)
	if _, err := exec.LookPath(demo); err != nil {
		t.Skipf("SKIP needs -demo: %v", err)
	}
	began := time.Now()
	out, status := runDemo(t, 0)
	whole := time.Since(began)
	if status != 0 || !strings.Contains(out, "Everything was as announced.") {
		t.Fatalf("status %d:\n%s", status, lastBytes(out, 8<<10))
	}
	// A boot that had to be done twice says nothing about the next one's length.
	whole = min(whole, time.Duration(8*float64(time.Second)*tools.Stretch))
	interrupted := 0
	for i := range 4 {
		// One in each quarter.
		after := time.Duration((float64(i) + rand.Float64()) / 4 * float64(whole))
		t.Run(fmt.Sprintf("interrupted after %v", after.Round(time.Millisecond)), func(t *testing.T) {
			out, status := runDemo(t, after)
			// It may have been quicker than the first time.
			over := status == 0 && strings.Contains(out, "Everything was as announced.")
			if status == 130 {
				interrupted++
			} else if !over {
				t.Errorf("status %d:\n%s", status, lastBytes(out, 8<<10))
			}
		})
	}
	if interrupted == 0 {
		t.Error("no run was interrupted before its end")
	}
}

// runDemo runs the demo in a directory of its own, interrupts it as a terminal
// would, and asserts that nothing is left there.
func runDemo(t *testing.T, interrupt time.Duration) (out string, status int) {
	t.Helper()
	tmp, err := os.MkdirTemp("", "d")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(float64(5*time.Minute)*tools.Stretch))
	defer cancel()
	cmd := exec.CommandContext(ctx, demo, "-vmm", tools.VMM, "-virtiofsd", tools.Virtiofsd, "-kernel", tools.Kernel,
		"-initramfs", tools.Initramfs, "-shim", tools.Shim, "-broker", tools.Broker, "-cap", tools.Cap,
		"-stretch", fmt.Sprint(tools.Stretch))
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if interrupt > 0 {
		stop := time.AfterFunc(interrupt, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) })
		defer stop.Stop()
	}
	raw, _ := cmd.CombinedOutput()
	if left := processesNaming(tmp); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "\n"))
	}
	if left, _ := filepath.Glob(tmp + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	return string(raw), cmd.ProcessState.ExitCode()
}

func processesNaming(dir string) (out []string) {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range all {
		if raw, err := os.ReadFile(path); err == nil && strings.Contains(string(raw), dir) {
			out = append(out, path+": "+strings.ReplaceAll(string(raw), "\x00", " "))
		}
	}
	return out
}
