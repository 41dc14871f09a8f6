package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"spectrum-os.org/broker/vmm/shim"
)

func reapVM(dir string) error { return shim.Reap(dir) }

// Processes are those whose command line or environment names the desktop's
// directory, this process and zombies excepted: "pid: command line".
func (d *Desktop) Processes() []string {
	var out []string
	stats, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range stats {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() || pid == os.Getppid() {
			continue
		}
		status, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		// The state follows the command in parentheses.
		rest := string(status[strings.LastIndexByte(string(status), ')')+1:])
		if f := strings.Fields(rest); len(f) == 0 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		line := strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
		if strings.Contains(line, d.Dir) || d.holds(dir) {
			out = append(out, fmt.Sprintf("%d: %s", pid, line))
		}
	}
	return out
}

// holds tells whether a process has a descriptor, its directory or its root
// beneath the desktop's directory.
func (d *Desktop) holds(proc string) bool {
	links, _ := filepath.Glob(filepath.Join(proc, "fd", "*"))
	for _, l := range append(links, filepath.Join(proc, "cwd"), filepath.Join(proc, "root")) {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, d.Dir+"/") {
			return true
		}
	}
	return false
}

// Mounts are the mounts beneath the desktop's directory.
func (d *Desktop) Mounts() []string {
	raw, _ := os.ReadFile("/proc/self/mountinfo")
	var out []string
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.Dir+"/") {
			out = append(out, f[4])
		}
	}
	return out
}

// Leftovers says what is left of a desktop that was closed: processes, mounts,
// sockets. It looks again for a while, as what was killed takes time to go.
func (d *Desktop) Leftovers(within time.Duration) []string {
	for end := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		var out []string
		for _, p := range d.Processes() {
			out = append(out, "process "+p)
		}
		for _, m := range d.Mounts() {
			out = append(out, "mount "+m)
		}
		_ = filepath.WalkDir(d.path("run"), func(path string, e os.DirEntry, err error) error {
			if err == nil && e.Type()&os.ModeSocket != 0 {
				out = append(out, "socket "+path)
			}
			return nil
		})
		vms, _ := filepath.Glob(d.path("run", "vm", "*"))
		for _, dir := range vms {
			out = append(out, "directory "+dir)
		}
		if len(out) == 0 || time.Now().After(end) {
			return out
		}
	}
}
