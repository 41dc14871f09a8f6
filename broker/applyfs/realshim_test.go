package applyfs

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/reconcile/conformance"
	"spectrum-os.org/broker/vmm/shim"
	"spectrum-os.org/broker/vmm/vmmtest"
)

// virtiofsd is the real one, as vmm/shim's own tests find it.
func virtiofsd(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes mount namespaces")
	}
	if path := os.Getenv("SPECTRUM_VIRTIOFSD"); path != "" {
		return path
	}
	if cache, err := os.UserCacheDir(); err == nil {
		path := filepath.Join(cache, "spectrum-broker/crates/bin/virtiofsd")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path, err := exec.LookPath("virtiofsd")
	if err != nil {
		t.Skip("needs virtiofsd, on PATH, in the cache or in SPECTRUM_VIRTIOFSD")
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		t.Fatal(err)
	}
	return path
}

// realVM is a real shim with real virtiofsds. Only its VMM is a fake.
type realVM struct {
	*shim.Client
	t   *testing.T
	dir string

	mu   sync.Mutex
	last string // run
}

// real gives the world's VM a real shim.
func (w *world) real() *realVM {
	w.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	spec := shim.Spec{
		VM: w.vm, RuntimeDir: filepath.Join(w.t.TempDir(), "vm"), VMM: exe, Virtiofsd: virtiofsd(w.t),
		MemoryMiB: 64, VCPUs: 1,
		// The fake guest is honest: only a busy machine could meet these.
		CutDeadline: 10 * time.Second, Stretch: 4,
	}
	kernel, err := os.Open("/proc/version")
	if err != nil {
		w.t.Fatal(err)
	}
	defer kernel.Close()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	c, err := shim.Start(ctx, shim.StartOptions{Binary: exe, Spec: spec, Kernel: kernel, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if w.t.Failed() {
			b, _ := os.ReadFile(filepath.Join(spec.RuntimeDir, "shim.log"))
			w.t.Logf("shim.log:\n%s", b)
		}
		if err := shim.Reap(spec.RuntimeDir); err != nil {
			w.t.Error(err)
		}
		c.Close()
	})
	v := &realVM{Client: c, t: w.t, dir: spec.RuntimeDir}
	w.instance = v.run
	w.set(c)
	return v
}

// run is the VM's present run, or the last one that it was asked for.
func (v *realVM) run() string {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.Exited():
	default:
		v.last = v.state().Instance
	}
	return v.last
}

func (v *realVM) state() shim.State {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := v.State(ctx)
	if err != nil {
		v.t.Fatal(err)
	}
	return s
}

// say drives the fake guest.
func (v *realVM) say(word string) {
	v.t.Helper()
	dir, err := os.Open(v.dir)
	if err != nil {
		v.t.Fatal(err)
	}
	defer dir.Close()
	// The address of a socket holds 107 bytes only.
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), vmmtest.Socket))
	if err != nil {
		v.t.Fatal(err)
	}
	defer conn.Close()
	_, _ = fmt.Fprintln(conn, word)
	_, _ = bufio.NewReader(conn).ReadString('\n')
}

// await waits until the shim's state is as is says.
func (v *realVM) await(is func(shim.State) bool) {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for s := v.state(); !is(s); {
		var err error
		if s, err = v.Watch(ctx, s.Seq); err != nil {
			v.t.Fatal(err)
		}
	}
}

// world is what serves shares, by looking at the shim's children. A process
// that is on no record counts as well.
func (v *realVM) world() map[string]conformance.Thing {
	v.t.Helper()
	out := map[string]conformance.Thing{}
	select {
	case <-v.Exited():
		// With it went whatever it had started; its records tell what that was.
		for _, p := range v.records() {
			if strings.HasPrefix(p.Role, "fs/") && startOf(p.PID) == p.Start {
				out[p.Role] = conformance.Thing{Identity: strconv.Itoa(p.PID)}
			}
		}
		return out
	default:
	}
	generations := map[string]uint64{}
	for _, o := range v.state().Objects {
		generations[o.ID] = o.Generation
	}
	roles := map[int]shim.Proc{}
	for _, p := range v.records() {
		roles[p.PID] = p
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", v.Proc().PID))
	for _, file := range tasks {
		b, _ := os.ReadFile(file)
		for _, word := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(word)
			if err != nil {
				v.t.Fatal(err)
			}
			start := startOf(pid)
			p, known := roles[pid]
			if start == 0 || known && p.Role == "vmm" {
				continue
			}
			id, ok := strings.CutPrefix(p.Role, "fs/")
			if !known || !ok || p.Start != start {
				id = fmt.Sprintf("process %d", pid)
			}
			out[id] = conformance.Thing{Generation: generations[id], Identity: fmt.Sprintf("%d@%d", pid, start)}
		}
	}
	return out
}

func (v *realVM) records() []shim.Proc {
	v.t.Helper()
	b, err := os.ReadFile(filepath.Join(v.dir, "processes.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var r struct {
		Procs []shim.Proc `json:"procs"`
	}
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	return r.Procs
}

// startOf is when a process began (field 22 of its stat), or 0 where it has
// ended.
func startOf(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0
	}
	start, _ := strconv.ParseUint(fields[19], 10, 64)
	return start
}

func (v *realVM) lose(id string) {
	v.t.Helper()
	v.say("eject fs-" + id)
	v.await(func(s shim.State) bool {
		return !slices.ContainsFunc(s.Objects, func(o shim.ObjectState) bool { return o.ID == id })
	})
}

func (v *realVM) reboot() {
	v.t.Helper()
	before := v.state().Instance
	v.say("reboot")
	v.await(func(s shim.State) bool { return s.Phase == shim.Running && s.Instance != before })
}

func (v *realVM) stop() {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := v.Stop(ctx, 5*time.Second); err != nil {
		v.t.Fatal(err)
	}
}

func TestConformanceOnARealShim(t *testing.T) {
	virtiofsd(t)
	conformance.Run(t, func(t *testing.T) conformance.Harness {
		w := newWorld(t)
		v := w.real()
		h := w.harness()
		h.World, h.Lose, h.Reboot = v.world, v.lose, v.reboot
		h.Stop = func() {
			v.stop()
			w.set(nil)
		}
		return h
	})
}
