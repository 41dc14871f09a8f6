package e2e

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/vmm"
	"spectrum-os.org/broker/vmm/shim"
)

// cutDeadline is the broker's default, before stretching.
const cutDeadline = 2 * time.Second

// TestCut takes things from guests that are busy with them, that hold on to
// them, and that cannot let go.
func TestCut(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{
		"docs/a.txt": "alpha\n", "big/blob": strings.Repeat("0123456789abcdef", 1<<18), "box/keep": "kept\n",
	})
	subject, innocent := w.vm(p, "subject", smallVM), w.vm(p, "innocent", smallVM)
	w.start()
	guests := w.boot(subject, innocent)
	g := guests[0]
	docs, big, box := fs("ro", p, "/docs"), fs("ro", p, "/big"), fs("rw", p, "/box")
	idle := w.measure(innocent, docs, 3)
	t.Logf("idle: %v", idle)

	// worksAgain says that the VM is none the worse.
	worksAgain := func(w *world) {
		w.t.Helper()
		if vm := w.show(subject); vm.State != api.VMRunning || len(vm.Degraded) > 0 {
			w.t.Errorf("the VM is %s: %v", vm.State, vm.Degraded)
		}
		w.nothingServed(subject)
		next := w.grant(subject, docs, "next")
		if err := (&guest{w, subject, g.Client}).reads("next", "alpha"); err != nil {
			w.t.Errorf("the next grant: %v", err)
		}
		w.revoke(next.ID)
	}

	t.Run("busy reader and busy writer", func(t *testing.T) {
		w := w.sub(t)
		for range 2 {
			grants := []api.Grant{w.grant(subject, big, "read"), w.grant(subject, box, "write")}
			reader := w.busy(g, "reading", "spectrum-test-exec", "read-loop", "/run/spectrum/fs/read/blob")
			writer := w.busy(g, "writing", "spectrum-test-exec", "write-loop", "/run/spectrum/fs/write/new")
			served := append(w.serving(subject, grants[0].ID), w.serving(subject, grants[1].ID)...)
			began := time.Now()
			w.revoke(grants[0].ID, grants[1].ID)
			took := time.Since(began)
			w.allDead(served)
			if took > w.Stretched(cutDeadline) {
				t.Errorf("an honest guest took %v to let go, longer than the deadline of %v", took, w.Stretched(cutDeadline))
			}
			for name, busy := range map[string]*execclient.Process{"reader": reader, "writer": writer} {
				select {
				case <-busy.Done():
				case <-time.After(w.Stretched(10 * time.Second)):
					t.Fatalf("the %s goes on", name)
				}
				r, err := busy.Wait()
				if err != nil || r.Exit != 5 {
					t.Errorf("the %s ended with %d, %v: %s", name, r.Exit, err, r.Stderr)
				}
			}
			t.Logf("cut in %v", took.Round(time.Millisecond))
			worksAgain(w)
		}
	})

	t.Run("open, mapped and working directory", func(t *testing.T) {
		w := w.sub(t)
		grants := []uuid.UUID{w.grant(subject, box, "held").ID, w.grant(subject, big, "unread").ID}
		// A program that runs is a mapped file; 4 and 5 are open and were never
		// read, so that no cache can answer for them.
		holder := w.busy(g, "holding", "sh", "-c", `
			cd /run/spectrum/fs/held && cp /bin/busybox ./sleep && chmod 755 sleep && sync &&
			{ ./sleep 1000 & } && exec 4</run/spectrum/fs/unread/blob 5>fresh && echo holding
			while ! [ -e /tmp/go ]; do sleep 0.1; done
			head -c 16 <&4 && echo READ
			echo x >&5 && sync && echo WRITTEN
			ls . && echo LISTED
			echo y >./other && echo CREATED
			echo checked`)
		served := append(w.serving(subject, grants[0]), w.serving(subject, grants[1])...)
		w.revoke(grants...)
		w.allDead(served)
		(&guest{w, subject, g.Client}).sh("touch /tmp/go")
		if err := holder.AwaitOutput(w.ctx(20*time.Second), "checked"); err != nil {
			t.Fatalf("what held the share hangs: %v", err)
		}
		r, _ := holder.Sofar()
		if got := strings.TrimSpace(string(r.Stdout)); got != "holding\nchecked" {
			t.Errorf("after the cut the guest still did %q; errors %q", got, r.Stderr)
		}
		if n := strings.Count(string(r.Stderr), "not connected"); n < 3 {
			t.Errorf("it failed %d times for being cut off, want at least 3: %s", n, r.Stderr)
		}
		holder.Kill()
		(&guest{w, subject, g.Client}).sh("kill -9 $(pidof sleep) 2>/dev/null; rm -f /tmp/go")
		worksAgain(w)
	})

	t.Run("paused", func(t *testing.T) { w.sub(t).cutPaused(t, subject, innocent, idle, big, docs) })
}

// TestCutManyPaused revokes much from a VM whose CPUs stand still: it is all cut
// at one deadline, not in one wave after another.
func TestCutManyPaused(t *testing.T) {
	const many = 20
	w := newWorld(t)
	p := w.partition(manyFiles(many))
	vm := w.vm(p, "still", "memory_mib = 384\nvcpus = 2\n")
	w.start()
	w.boot(vm)
	var ids []uuid.UUID
	var served []int
	for i := range many {
		g := w.grant(vm, fs("ro", p, fmt.Sprintf("/d%d", i)), fmt.Sprintf("d%d", i))
		ids, served = append(ids, g.ID), append(served, w.serving(vm, g.ID)...)
	}
	w.must(vmm.NewClient(filepath.Join(w.VMDir(vm), "vmm.sock")).Pause(w.ctx(10 * time.Second)))
	began := time.Now()
	w.revoke(ids...)
	took := time.Since(began)
	w.allDead(served)
	if limit := 2 * w.Stretched(cutDeadline); took > limit {
		t.Errorf("%d grants took %v to cut, more than %v", many, took, limit)
	}
	t.Logf("%d grants cut in %v, with a deadline of %v", many, took.Round(time.Millisecond), w.Stretched(cutDeadline))
}

// cutPaused revokes from a VM whose CPUs stand still.
func (w *world) cutPaused(t *testing.T, subject, innocent uuid.UUID, idle timing, held, other string) {
	grant := w.grant(subject, held, "held")
	served := w.serving(subject, grant.ID)
	before := w.shimState(subject)
	machine := vmm.NewClient(filepath.Join(w.VMDir(subject), "vmm.sock"))
	w.must(machine.Pause(w.ctx(10 * time.Second)))
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			w.must(machine.Resume(w.ctx(10 * time.Second)))
		}
	}
	defer resume()

	// Whoever looks at the grant meanwhile never sees it revoked while a
	// process serves it.
	looked := make(chan error, 1)
	began := time.Now()
	go func() {
		for end := began.Add(w.Stretched(cutDeadline + 20*time.Second)); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			g, err := w.direct.ShowGrant(context.Background(), grant.ID.String())
			if err != nil {
				looked <- err
				return
			}
			if g.State != api.GrantRevoked {
				continue
			}
			for _, pid := range served {
				if alive(pid) {
					looked <- fmt.Errorf("it is said to be revoked while process %d serves it", pid)
					return
				}
			}
			looked <- nil
			return
		}
		looked <- errors.New("it never is revoked")
	}()
	out, status := w.cap("revoke", grant.ID.String(), "--timeout", "300ms")
	if status != 6 || !strings.Contains(out, "revoking") {
		t.Errorf("before the deadline `revoke` exits with %d: %q; want 6 and \"revoking\"", status, out)
	}
	if !slices.ContainsFunc(served, alive) {
		t.Error("virtiofsd is gone before the deadline: the guest was not given its time")
	}
	busy := w.measure(innocent, other, 2)
	w.keepsTime("a paused VM", idle, busy)
	if out, status = w.cap("revoke", grant.ID.String()); status != 0 {
		t.Errorf("the second `revoke` exits with %d: %q", status, out)
	}
	w.allDead(served)
	took := time.Since(began)
	if err := <-looked; err != nil {
		t.Error(err)
	}
	if g, err := w.direct.ShowGrant(w.ctx(10*time.Second), grant.ID.String()); err != nil || !strings.Contains(g.Degraded, "did not let go in time") {
		t.Errorf("the grant does not say that it took force: %q, %v", g.Degraded, err)
	}
	after := w.shimState(subject)
	if i := slices.IndexFunc(after.Objects, func(o shim.ObjectState) bool { return strings.Contains(o.ID, grant.ID.String()) }); i < 0 {
		t.Errorf("the shim has forgotten whom it cut off: %+v", after.Objects)
	} else if o := after.Objects[i]; !o.Killed || o.Phase != shim.Gone {
		t.Errorf("the shim says %+v, want it killed and gone", o)
	}
	if after.SlotsFree != before.SlotsFree {
		t.Errorf("%d slots are free, %d before the cut: the slot is used again", after.SlotsFree, before.SlotsFree)
	}
	vm := w.show(subject)
	if vm.State != api.VMDegraded || len(vm.Degraded) != 1 || !strings.Contains(vm.Degraded[0], grant.ID.String()) {
		t.Errorf("the VM is shown as %s: %q", vm.State, vm.Degraded)
	}
	if out, _ := w.cap("vm", "show", subject.String()); !strings.Contains(out, "degraded") {
		t.Errorf("`vm show` does not say that the VM is degraded: %s", out)
	}
	t.Logf("seen to be cut after %v, with a deadline of %v", took.Round(time.Millisecond), w.Stretched(cutDeadline))

	// The request to let go, or the reader, may have found a dead virtiofsd: then
	// the guest's own hot-plug stands still until it restarts, and the answer
	// must say that nothing was mounted.
	resume()
	g := &guest{w, subject, w.Guest(subject)}
	w.must(g.Await(w.ctx(30 * time.Second)))
	reader, err := g.Start(w.ctx(10*time.Second), execclient.Command{Argv: []string{"sh", "-c", "head -c 16 /run/spectrum/fs/held/blob"}})
	w.must(err)
	next := w.grant(subject, other, "after")
	if now := w.shimState(subject); now.SlotsFree != before.SlotsFree-1 {
		t.Errorf("%d slots are free beside one grant, want %d: the retired slot is used again", now.SlotsFree, before.SlotsFree-1)
	}
	degraded := 1
	if next.MountPath == "" {
		t.Logf("the guest's hot-plug stands still: %s", next.Reason)
		degraded++
		if !strings.Contains(next.Reason, "did not mount it in time") {
			t.Errorf("a grant that the guest did not mount says %q", next.Reason)
		}
	} else if err := g.reads("after", "alpha"); err != nil {
		t.Errorf("the next grant to the VM that was paused: %v", err)
	}
	w.revoke(next.ID)
	reader.Kill()
	if r, _ := reader.Sofar(); len(r.Stdout) > 0 {
		t.Errorf("after the cut the guest reads %q", r.Stdout)
	}
	if vm := w.show(subject); vm.State != api.VMDegraded || len(vm.Degraded) != degraded {
		t.Errorf("the VM is shown as %s: %q, want %d reasons", vm.State, vm.Degraded, degraded)
	}

	// A restart heals it.
	now := 0.0
	_, err = w.direct.StopVM(w.ctx(30*time.Second), subject.String(), api.StopRequest{GraceSeconds: &now})
	w.must(err)
	g = w.boot(subject)[0]
	if vm := w.show(subject); vm.State != api.VMRunning || len(vm.Degraded) > 0 {
		t.Errorf("after a restart the VM is %s: %q", vm.State, vm.Degraded)
	}
	if now := w.shimState(subject); now.SlotsFree != before.SlotsFree+1 {
		t.Errorf("after a restart %d slots are free, want %d", now.SlotsFree, before.SlotsFree+1)
	}
	healed := w.grant(subject, other, "healed")
	if err := g.reads("healed", "alpha"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	w.revoke(healed.ID)
}

// timing is how long a grant and a revocation take, the median of some.
type timing struct{ grant, revoke time.Duration }

func (m timing) String() string {
	return fmt.Sprintf("grant %v, revoke %v", m.grant.Round(time.Millisecond), m.revoke.Round(time.Millisecond))
}

// measure grants and revokes so often on a VM that must not suffer.
func (w *world) measure(vm uuid.UUID, capability string, times int) timing {
	w.t.Helper()
	var grants, revokes []time.Duration
	for range times {
		began := time.Now()
		g := w.grant(vm, capability, "probe")
		grants = append(grants, time.Since(began))
		if g.MountPath == "" {
			w.t.Errorf("the VM that must not suffer did not mount it: %s", g.Reason)
		}
		began = time.Now()
		w.revoke(g.ID)
		revokes = append(revokes, time.Since(began))
	}
	slices.Sort(grants)
	slices.Sort(revokes)
	if now := w.show(vm); len(now.Degraded) > 0 {
		w.t.Errorf("the VM that must not suffer is degraded: %q", now.Degraded)
	}
	return timing{grants[times/2], revokes[times/2]}
}

// keepsTime compares with the idle probe of the same run. The bound is wide
// since the guests share the machine's CPUs; what it excludes is waiting for
// another VM's deadline.
func (w *world) keepsTime(meanwhile string, idle, busy timing) {
	w.t.Helper()
	w.t.Logf("beside %s: %v; idle: %v; revoke ×%.1f", meanwhile, busy, idle, float64(busy.revoke)/float64(idle.revoke))
	slack := w.Stretched(cutDeadline) / 2
	if busy.revoke > 3*idle.revoke+slack {
		w.t.Errorf("beside %s a revocation takes %v, %v when idle", meanwhile, busy.revoke, idle.revoke)
	}
	if busy.grant > 3*idle.grant+2*slack {
		w.t.Errorf("beside %s a grant takes %v, %v when idle", meanwhile, busy.grant, idle.grant)
	}
}

func (w *world) shimState(vm uuid.UUID) shim.State {
	w.t.Helper()
	c, err := shim.Dial(w.VMDir(vm))
	w.must(err)
	defer c.Close()
	state, err := c.State(w.ctx(10 * time.Second))
	w.must(err)
	return state
}

// serving are the processes that serve a grant.
func (w *world) serving(vm, grant uuid.UUID) []int {
	w.t.Helper()
	var out []int
	for _, o := range w.shimState(vm).Objects {
		if !strings.Contains(o.ID, grant.String()) {
			continue
		}
		for _, p := range o.PIDs {
			out = append(out, descendants(p.PID)...)
		}
	}
	if len(out) == 0 {
		w.t.Fatalf("nothing serves grant %s", grant)
	}
	return out
}

func (w *world) allDead(pids []int) {
	w.t.Helper()
	for _, pid := range pids {
		if alive(pid) {
			w.t.Errorf("revoked, and process %d still serves: %s", pid, cmdline(pid))
		}
	}
}

// busy starts a command in the guest and waits for its first word.
func (w *world) busy(g *guest, word string, argv ...string) *execclient.Process {
	w.t.Helper()
	p, err := g.Start(w.ctx(3*time.Minute), execclient.Command{Argv: argv})
	w.must(err)
	w.t.Cleanup(p.Kill)
	if err := p.AwaitOutput(w.ctx(30*time.Second), word); err != nil {
		r, _ := p.Sofar()
		w.t.Fatalf("%s did not begin: %v: %s", argv, err, r.Stderr)
	}
	return p
}

// cap runs spectrum-cap and returns what it printed, and its status.
func (w *world) cap(args ...string) (string, int) {
	w.t.Helper()
	cmd := exec.CommandContext(w.ctx(2*time.Minute), tools.Cap, append(args, "--socket", w.Socket())...)
	out, err := cmd.CombinedOutput()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		w.t.Fatalf("spectrum-cap %v: %v", args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
