package disks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/test/harness"
	"spectrum-os.org/broker/test/powercut"
	"spectrum-os.org/broker/vmm/shim"
)

const policy = `package spectrum.grant

allow if input.holder.partition == input.partition
`

const hostPolicy = `package spectrum.grant

allow if input.requester.kind == "person"
`

// world is a desktop whose state directory is on a disk of its own. Nothing here
// opens the ledger where it is: a process must not map files that it serves.
type world struct {
	*harness.Desktop
	t      *testing.T
	disk   *powercut.Disk
	mount  *powercut.Mount
	at     string // where the disk is mounted
	part   harness.Partition
	vm     uuid.UUID
	labels atomic.Int64
}

func newWorld(t *testing.T) *world {
	t.Helper()
	needTools(t)
	dir, err := os.MkdirTemp("", "disk-") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(tools, dir)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Desktop: d, t: t, disk: powercut.New(), at: filepath.Join(dir, "disk")}
	w.State = filepath.Join(w.at, "state")
	d.BrokerArgs = []string{"--boot-grace", "1ms", "--cut-deadline", "300ms"}
	w.must(os.Mkdir(w.at, 0o700))
	t.Cleanup(w.end)
	w.plug()
	w.must(d.HostPolicy("host.rego", hostPolicy))
	files := map[string]string{}
	for i := range 4 {
		files[fmt.Sprintf("d%d/file", i)] = "content\n"
	}
	w.part, err = d.AddPartition(files, map[string]string{"grant.rego": policy})
	w.must(err)
	w.vm, err = d.AddVM(w.part, "app", "memory_mib = 32\n")
	w.must(err)
	// The words to the VMM without a guest; none.
	w.must(os.WriteFile(filepath.Join(w.part.Dir, "svc/data/app/cmdline"), []byte("\n"), 0o644)) //nolint:gosec // as a partition has it
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ctx(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(d))
	w.t.Cleanup(cancel)
	return ctx
}

// plug mounts the disk.
func (w *world) plug() {
	w.t.Helper()
	var err error
	w.mount, err = w.disk.Mount(w.at)
	w.must(err)
}

// killBroker sends SIGKILL and does not wait.
func (w *world) killBroker() {
	if pid := w.BrokerPID(); pid != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// unplug cuts the power.
func (w *world) unplug() {
	w.t.Helper()
	err := w.mount.PowerCut(w.killBroker)
	w.mount = nil
	w.must(errors.Join(err, w.StopBroker(syscall.SIGKILL)))
}

func (w *world) start() error { return w.StartBroker(w.ctx(30 * time.Second)) }

// end closes the desktop. Its end is a test too.
func (w *world) end() {
	if w.t.Failed() {
		if log, err := os.ReadFile(filepath.Join(w.Dir, "broker.log")); err == nil {
			w.t.Logf("the end of the broker's log:\n%s", log[max(0, len(log)-6<<10):])
		}
	}
	w.disk.Heal()
	if err := w.Close(); err != nil {
		w.t.Errorf("the desktop did not close: %v", err)
	}
	if w.mount != nil {
		if err := w.mount.Close(); err != nil {
			w.t.Error(err)
		}
	}
	// Of a broker that had no time to remove it.
	_ = os.Remove(w.Socket())
	if left := w.Leftovers(w.Stretched(10 * time.Second)); len(left) > 0 {
		w.t.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	if err := os.RemoveAll(w.Dir); err != nil {
		w.t.Error(err)
	}
}

// verify holds the chain on the disk against itself.
func (w *world) verify() error {
	dir, err := os.MkdirTemp(w.Dir, "copy-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := w.disk.Export(dir); err != nil {
		return err
	}
	r, err := ledger.Verify(context.Background(), filepath.Join(dir, "state"))
	switch {
	case r.Broken != nil:
		return r.Broken
	case errors.Is(err, ledger.ErrNotLedger) && w.labels.Load() == 0:
		return nil // it was not born yet
	}
	return err
}

// spelling is the capability of one of the partition's directories.
func (w *world) spelling(n int) string { return fmt.Sprintf("fs:ro:%s:/d%d", w.part.ID, n%4) }

// ask asks for a grant under a label of its own.
func (w *world) ask(ctx context.Context, persist bool) (label string, g api.Grant, err error) {
	n := w.labels.Add(1)
	label = fmt.Sprintf("grant-%04d", n)
	g, err = w.Client.Grant(ctx, api.GrantRequest{
		VM: w.vm.String(), Capability: w.spelling(int(n)), Label: label, Persist: persist, Wait: true,
	})
	return label, g, err
}

// grants are all there ever were, by label.
func (w *world) grants(ctx context.Context) (map[string]api.Grant, error) {
	list, err := w.Client.ListGrants(ctx, api.GrantFilter{All: true})
	out := map[string]api.Grant{}
	for _, g := range list {
		out[g.Label] = g
	}
	return out, err
}

// serving are the processes that serve a grant, as the shim knows them.
func (w *world) serving(grant uuid.UUID) []int {
	w.t.Helper()
	client, err := shim.Dial(w.VMDir(w.vm))
	w.must(err)
	defer client.Close()
	state, err := client.State(w.ctx(10 * time.Second))
	w.must(err)
	var pids []int
	for _, o := range state.Objects {
		if o.ID == "fs-"+grant.String() {
			for _, p := range o.PIDs {
				pids = append(pids, p.PID)
			}
		}
	}
	return pids
}

// alive are those of some processes that run, zombies excepted.
func alive(pids []int) []int {
	return slices.DeleteFunc(slices.Clone(pids), func(pid int) bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return true
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
	})
}

// eventually waits for f to have nothing to say against it.
func (w *world) eventually(what string, f func() error) {
	w.t.Helper()
	var err error
	for end := time.Now().Add(w.Stretched(30 * time.Second)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	w.t.Errorf("%s: %v", what, err)
}
