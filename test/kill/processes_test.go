package kill

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is one of those that this one has begotten, adopted ones included.
type process struct {
	pid, parent int
	state       byte
	command     string
}

func processOf(pid int) (process, bool) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, false
	}
	// The state and the parent follow the command in parentheses.
	f := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	if len(f) < 2 {
		return process{}, false
	}
	parent, _ := strconv.Atoi(f[1])
	line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return process{pid, parent, f[0][0], string(bytes.TrimSpace(bytes.ReplaceAll(line, []byte{0}, []byte{' '})))}, true
}

// descendants are all that run beneath this process. A zombie does not run.
func descendants() []process {
	var all []process
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, name := range names {
		pid, _ := strconv.Atoi(filepath.Base(name))
		if p, ok := processOf(pid); ok {
			all = append(all, p)
		}
	}
	ours := map[int]bool{os.Getpid(): true}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if ours[p.parent] && !ours[p.pid] {
				ours[p.pid] = true
				grown = true
			}
		}
	}
	var out []process
	for _, p := range all {
		if ours[p.pid] && p.pid != os.Getpid() && p.state != 'Z' && p.state != 'X' {
			out = append(out, p)
		}
	}
	return out
}

func describe(ps []process) []string {
	var out []string
	for _, p := range ps {
		out = append(out, fmt.Sprintf("process %d (of %d): %s", p.pid, p.parent, p.command))
	}
	return out
}

func isShim(pid int) bool {
	p, ok := processOf(pid)
	return ok && p.state != 'Z' && strings.Contains(p.command, filepath.Base(tools.Shim)) && strings.HasSuffix(p.command, " serve")
}

// collect takes the exit status of the orphans that died here, except the
// broker's, which belongs to whoever waits for it.
func (w *world) collect() { collectZombies(w.BrokerPID()) }

func collectZombies(except int) {
	names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", os.Getpid()))
	for _, name := range names {
		raw, _ := os.ReadFile(name)
		for _, f := range strings.Fields(string(raw)) {
			pid, _ := strconv.Atoi(f)
			if p, ok := processOf(pid); ok && p.state == 'Z' && pid != except {
				_, _ = syscall.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}
