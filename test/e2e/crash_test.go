package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/vmm/shim"
)

// TestBrokerCrash kills the broker at every kind of moment. The VM and what
// was granted to it go on; the next broker adopts, finishes or undoes, and is
// ready only then.
func TestBrokerCrash(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "orphan/o.txt": "nobody granted it\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]
	instance := w.show(vm).Instance
	docs := fs("ro", p, "/docs")

	step := func(name string, f func(w *world, g *guest)) {
		ok := t.Run(name, func(t *testing.T) {
			f(w.sub(t), &guest{w.sub(t), vm, g.Client})
			if now := w.show(vm); now.Instance != instance || now.State != api.VMRunning {
				t.Errorf("the VM is %s in run %s, want it running in %s (degraded: %v)", now.State, now.Instance, instance, now.Degraded)
			}
			checkChain(t, w.StateDir())
		})
		if !ok {
			t.FailNow()
		}
	}

	step("during a grant", func(w *world, g *guest) {
		reached := map[api.GrantState]int{}
		for i := range 7 {
			label := "crash-" + strconv.Itoa(i)
			acknowledged := make(chan bool, 1)
			go func() {
				got, err := w.tryGrant(vm, docs, label)
				acknowledged <- err == nil && got.State == api.GrantActive
			}()
			// Squared: most of what a grant does, it does at its start.
			time.Sleep(time.Duration(rand.IntN(16)*rand.IntN(16)) * time.Millisecond)
			w.crash()
			told := <-acknowledged
			w.start()
			grant := w.settled(label)
			reached[grant.State]++
			switch {
			case grant.State == api.GrantActive:
				if grant.Observed.State != "attached" {
					w.t.Errorf("%s is active and %s", label, grant.Observed.State)
				}
				w.eventually(10*time.Second, func() error { return g.reads(label, "alpha") })
				w.revoke(grant.ID)
			case told:
				w.t.Errorf("%s was acknowledged, and is %q after the crash (%s)", label, grant.State, grant.Reason)
			default:
				if g.reads(label, "alpha") == nil {
					w.t.Errorf("%s is %q, and the guest reads it", label, grant.State)
				}
			}
			w.nothingServed(vm)
		}
		w.t.Logf("outcomes: %v", reached)
	})

	step("during a revocation", func(w *world, g *guest) {
		for i := range 6 {
			label := "cut-" + strconv.Itoa(i)
			grant := w.grant(vm, docs, label)
			// Even rounds are killed once the revocation is durable, odd ones
			// at any moment of it.
			durable := i%2 == 0
			acknowledged := make(chan bool, 1)
			go func() {
				_, err := w.Client.Revoke(w.ctx(time.Minute), api.RevokeRequest{IDs: []string{grant.ID.String()}, Wait: !durable})
				acknowledged <- err == nil
			}()
			told := false
			if durable {
				told = <-acknowledged
			} else {
				time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
			}
			w.crash()
			if !durable {
				told = <-acknowledged
			}
			w.start()
			now := w.settled(label)
			if now.State == api.GrantActive && !told {
				w.revoke(grant.ID) // the kill came first
			} else if now.State != api.GrantRevoked {
				w.t.Fatalf("%s is %s after a revocation (acknowledged: %v) and a crash", label, now.State, told)
			}
			if g.reads(label, "alpha") == nil {
				w.t.Errorf("%s is revoked, and the guest reads it", label)
			}
			w.nothingServed(vm)
		}
	})

	step("at rest", func(w *world, g *guest) {
		grant := w.grant(vm, docs, "rest")
		w.crash()
		w.must(os.WriteFile(p.Dir+"/files/docs/late.txt", []byte("written later\n"), 0o644))
		if out, status := g.sh("cat /run/spectrum/fs/rest/late.txt"); status != 0 || out != "written later" {
			w.t.Errorf("without a broker the guest reads %q, status %d", out, status)
		}
		w.start()
		now := w.settled("rest")
		if now.ID != grant.ID || now.State != api.GrantActive || now.Observed.State != "attached" || now.Generation != grant.Generation {
			w.t.Errorf("grant %s is %s and %s, generation %d; was %s, generation %d",
				now.ID, now.State, now.Observed.State, now.Generation, grant.ID, grant.Generation)
		}
		if err := g.reads("rest", "alpha"); err != nil {
			w.t.Error(err)
		}
		w.eventually(10*time.Second, func() error {
			if out, status := g.sh("spectrum-agent list"); status != 0 || !strings.Contains(out, "rest") {
				return fmt.Errorf("the agent lists %q, status %d", out, status)
			}
			return nil
		})
		w.revoke(grant.ID)
		w.nothingServed(vm)
	})

	step("ended in good order", func(w *world, g *guest) {
		grant := w.grant(vm, docs, "term")
		w.must(w.StopBroker(syscall.SIGTERM))
		if err := g.reads("term", "alpha"); err != nil {
			w.t.Error(err)
		}
		w.start()
		if now := w.settled("term"); now.State != api.GrantActive || now.Observed.State != "attached" {
			w.t.Errorf("the grant is %s and %s", now.State, now.Observed.State)
		}
		w.revoke(grant.ID)
	})

	step("an orphan is removed before ready", func(w *world, g *guest) {
		revoked := w.grant(vm, docs, "once")
		w.revoke(revoked.ID)
		w.crash()
		client, err := shim.Dial(w.VMDir(vm))
		w.must(err)
		defer client.Close()
		dir, err := os.OpenFile(p.Dir+"/files/orphan", unix.O_PATH|unix.O_DIRECTORY, 0)
		w.must(err)
		defer dir.Close()
		for i, id := range []string{"fs-" + uuid.NewString(), "fs-" + revoked.ID.String(), "stray"} {
			put, err := client.Put(w.ctx(time.Minute), shim.Object{
				ID: id, Generation: 99, Instance: instance, Tag: "orphan" + strconv.Itoa(i), ReadOnly: true,
			}, dir)
			w.must(err)
			if put.Phase != shim.Attached {
				w.t.Fatalf("%s is %s", id, put.Phase)
			}
		}
		// The guest takes a moment to find the device.
		w.eventually(10*time.Second, func() error {
			if out, status := g.sh("mkdir -p /tmp/o && mount -t virtiofs orphan0 /tmp/o && cat /tmp/o/o.txt"); status != 0 || out != "nobody granted it" {
				return fmt.Errorf("the guest cannot use the orphan, so the test shows nothing: %q", out)
			}
			return nil
		})
		w.start()
		w.nothingServed(vm)
		if out, status := g.sh("cat /tmp/o/o.txt"); status == 0 {
			w.t.Errorf("the guest still reads the orphan: %q", out)
		}
		g.sh("umount -l /tmp/o")
	})

	step("a lease ends without a broker", func(w *world, g *guest) {
		ttl := int64(4)
		grant, err := w.Client.Grant(w.ctx(time.Minute), api.GrantRequest{VM: vm.String(), Capability: docs, Label: "lease", TTLSeconds: &ttl, Wait: true})
		w.must(err)
		w.crash()
		readBefore := g.reads("lease", "alpha")
		if time.Now().Before(*grant.Expires) && readBefore != nil {
			w.t.Errorf("within its lease: %v", readBefore)
		}
		time.Sleep(time.Until(*grant.Expires))
		w.eventually(3*time.Second, func() error {
			if g.reads("lease", "alpha") == nil {
				return errors.New("the guest reads on after its lease")
			}
			return nil
		})
		w.t.Logf("cut %v after the deadline", time.Since(*grant.Expires).Round(10*time.Millisecond))
		w.eventually(5*time.Second, func() error { return w.stillServed(vm) })
		w.start()
		now := w.settled("lease")
		if now.State != api.GrantRevoked || !strings.Contains(now.Reason, "expired") {
			w.t.Errorf("the grant is %s (%q), want it revoked as expired", now.State, now.Reason)
		}
	})
}

// TestShimCrash kills a shim: its VM and all that served it die with it, its
// grants end, and the VM can be started again.
func TestShimCrash(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "more/b.txt": "beta\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	for _, brokerRuns := range []bool{true, false} {
		g := w.boot(vm)[0]
		first := w.grant(vm, fs("ro", p, "/docs"), "docs")
		second := w.grant(vm, fs("rw", p, "/more"), "more")
		if err := g.reads("docs", "alpha"); err != nil {
			t.Fatal(err)
		}
		before := w.show(vm)
		family := descendants(before.ShimPID)
		if len(family) < 4 { // the shim, the VMM, two virtiofsds
			t.Fatalf("the shim has only %v", family)
		}
		if !brokerRuns {
			w.crash()
		}
		w.must(syscall.Kill(before.ShimPID, syscall.SIGKILL))
		w.eventually(5*time.Second, func() error {
			for _, pid := range family {
				if alive(pid) {
					return fmt.Errorf("process %d outlives its shim: %s", pid, cmdline(pid))
				}
			}
			return nil
		})
		if !brokerRuns {
			w.start()
		}
		w.eventually(5*time.Second, func() error {
			if v := w.show(vm); v.State != api.VMStopped {
				return fmt.Errorf("the VM is %s", v.State)
			}
			return nil
		})
		for _, id := range []uuid.UUID{first.ID, second.ID} {
			w.eventually(5*time.Second, func() error { return w.ended(id, "the VM ended") })
		}
		exits := w.audit(api.EventQuery{VM: vm.String(), Types: []string{"vm.exited"}})
		if len(exits) == 0 || !strings.Contains(string(exits[len(exits)-1].Data), before.Instance) {
			t.Errorf("the end of run %s is not on record", before.Instance)
		}
	}
	// A shim that dies does not take the VM's future along.
	g := w.boot(vm)[0]
	w.grant(vm, fs("ro", p, "/docs"), "docs")
	if err := g.reads("docs", "alpha"); err != nil {
		t.Error(err)
	}
}

// crash kills the broker as a power cut would.
func (w *world) crash() {
	w.t.Helper()
	w.must(w.StopBroker(syscall.SIGKILL))
}

func (w *world) show(vm uuid.UUID) api.VM {
	w.t.Helper()
	v, err := w.Client.ShowVM(w.ctx(20*time.Second), vm.String())
	w.must(err)
	return v
}

func (w *world) audit(q api.EventQuery) []api.Event {
	w.t.Helper()
	q.Limit = 1000
	list, err := w.Client.Audit(w.ctx(10*time.Second), q)
	w.must(err)
	return list.Events
}

// settled is the grant with the label, as a broker that has just said to be
// ready tells it. No grant may be between two states by then.
func (w *world) settled(label string) api.Grant {
	w.t.Helper()
	all, err := w.Client.ListGrants(w.ctx(20*time.Second), api.GrantFilter{All: true})
	w.must(err)
	var out api.Grant
	for _, g := range all {
		if g.State == api.GrantPending || g.State == api.GrantRevoking {
			w.t.Errorf("the broker is ready, and grant %s (%s) is %s", g.ID, g.Label, g.State)
		}
		if g.Label == label {
			out = g
		}
	}
	return out
}

// ended says whether a grant is revoked for a reason that holds words.
func (w *world) ended(id uuid.UUID, words string) error {
	w.t.Helper()
	g, err := w.Client.ShowGrant(w.ctx(10*time.Second), id.String())
	if err != nil {
		return err
	}
	if g.State != api.GrantRevoked || !strings.Contains(g.Reason, words) {
		return fmt.Errorf("grant %s is %s (%q), want it revoked because %q", g.Label, g.State, g.Reason, words)
	}
	return nil
}

// nothingServed asserts that no object, socket or process of a grant is left
// in a VM that runs.
func (w *world) nothingServed(vm uuid.UUID) {
	w.t.Helper()
	if err := w.stillServed(vm); err != nil {
		w.t.Error(err)
	}
}

func (w *world) stillServed(vm uuid.UUID) error {
	client, err := shim.Dial(w.VMDir(vm))
	if err != nil {
		return err
	}
	defer client.Close()
	state, err := client.State(w.ctx(10 * time.Second))
	if err != nil {
		return err
	}
	if len(state.Objects) > 0 {
		return fmt.Errorf("the shim still has %d objects, the first: %+v", len(state.Objects), state.Objects[0])
	}
	if left, _ := filepath.Glob(w.VMDir(vm) + "/fs/*"); len(left) > 0 {
		return fmt.Errorf("left in the runtime directory: %v", left)
	}
	for _, pid := range descendants(state.ShimPid) {
		if strings.Contains(cmdline(pid), "virtiofsd") {
			return fmt.Errorf("process %d still serves: %s", pid, cmdline(pid))
		}
	}
	return nil
}

// reads says whether the guest can open and read a file of a grant.
func (g *guest) reads(label, want string) error {
	g.w.t.Helper()
	if out, status := g.sh("cat /run/spectrum/fs/" + label + "/*"); status != 0 || !strings.HasPrefix(out, want) {
		return fmt.Errorf("the guest reads %q from %s, status %d", out, label, status)
	}
	return nil
}

// descendants are a process and all beneath it.
func descendants(root int) []int {
	children := map[int][]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		// The state and the parent follow the command in parentheses.
		f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
		if parent, err := strconv.Atoi(f[1]); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	out := []int{root}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return slices.Compact(out)
}

func cmdline(pid int) string {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(raw), "\x00", " "))
}

// alive tells whether a process runs; a zombie does not.
func alive(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	return len(f) > 0 && f[0] != "Z" && f[0] != "X"
}
