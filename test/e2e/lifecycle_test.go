package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/harness"
)

// declaringVM asks at every start for a directory that policy allows, and for
// one that it does not.
const declaringVM = smallVM + `
[[grant]]
capability = "fs:ro:self:/docs"
label = "declared"

[[grant]]
capability = "fs:rw:self:/secret"
`

// allowDeclared lets definitions and guests ask, beside the person.
const allowDeclared = `package spectrum.grant

allow if input.action == "request"
`

// TestReboot reboots a guest in every situation. A reboot is the end of a run:
// its grants end, and the next run starts with what is declared.
func TestReboot(t *testing.T) {
	w := newWorld(t)
	w.must(w.HostPolicy("declared.rego", allowDeclared))
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "more/b.txt": "beta\n", "secret/s": "s\n"})
	vm := w.vm(p, "reader", declaringVM)
	w.start()
	g := w.boot(vm)[0]
	run := w.show(vm).Instance
	first := w.declared(vm, run)
	if err := g.reads("declared", "alpha"); err != nil {
		t.Fatal(err)
	}
	denied := func() int {
		n := 0
		for _, e := range w.audit(api.EventQuery{VM: vm.String(), Types: []string{"grant.denied"}}) {
			if e.Actor.Kind != "definition" || !strings.Contains(string(e.Data), "nobody gets the secrets") {
				t.Errorf("denied to %s: %s", e.Actor.Kind, e.Data)
			}
			n++
		}
		return n
	}
	w.eventually(5*time.Second, func() error {
		if n := denied(); n != 1 {
			return fmt.Errorf("%d denials on record, want the one of the declared secret", n)
		}
		return nil
	})

	// With grants.
	more := w.grant(vm, fs("ro", p, "/more"), "more")
	g.reboot()
	run = w.nextRun(vm, run)
	for _, id := range []uuid.UUID{first.ID, more.ID} {
		w.eventually(10*time.Second, func() error { return w.ended(id, "the VM rebooted") })
	}
	g.await()
	second := w.declared(vm, run)
	if second.ID == first.ID {
		t.Error("a declared grant outlived its run")
	}
	w.eventually(5*time.Second, func() error { return g.reads("declared", "alpha") })
	if err := g.absent("/run/spectrum/fs/more"); err != nil {
		t.Error(err)
	}
	again := w.grant(vm, fs("ro", p, "/more"), "more")
	if err := g.reads("more", "beta"); err != nil {
		t.Error(err)
	}
	w.revoke(again.ID)

	// In the middle of a revocation.
	again = w.grant(vm, fs("ro", p, "/more"), "more")
	revoked := make(chan error, 1)
	go func() {
		_, err := w.Client.Revoke(w.ctx(time.Minute), api.RevokeRequest{IDs: []string{again.ID.String()}, Wait: true})
		revoked <- err
	}()
	g.reboot()
	run = w.nextRun(vm, run)
	w.must(<-revoked)
	if now, err := w.Client.ShowGrant(w.ctx(10*time.Second), again.ID.String()); err != nil || now.State != api.GrantRevoked {
		t.Errorf("revoked during a reboot, it is %s, %v", now.State, err)
	}
	g.await()
	w.declared(vm, run)
	if degraded := w.show(vm).Degraded; len(degraded) > 0 {
		t.Errorf("the new run is degraded: %v", degraded)
	}

	// While no broker runs.
	held := w.grant(vm, fs("ro", p, "/more"), "more")
	w.crash()
	g.reboot()
	time.Sleep(w.Stretched(time.Second)) // the old run must end first
	g.await()
	w.start()
	run = w.nextRun(vm, run)
	if err := w.ended(held.ID, "while no broker ran"); err != nil {
		t.Error(err)
	}
	w.declared(vm, run)
	w.eventually(5*time.Second, func() error { return g.reads("declared", "alpha") })
	w.eventually(5*time.Second, func() error {
		if n := denied(); n != 4 {
			return fmt.Errorf("%d denials on record, want one for each of 4 runs", n)
		}
		return nil
	})

	// Powering off is the end of the run and of the VM.
	last := w.grant(vm, fs("ro", p, "/more"), "more")
	g.off("poweroff -f")
	w.stopped(vm)
	w.eventually(10*time.Second, func() error { return w.ended(last.ID, "the VM ended: the guest shut down") })
}

// TestStopAndPersist stops VMs in every way, with grants that end with the run
// and one that does not.
func TestStopAndPersist(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "kept/k.txt": "kept\n"})
	q := w.partition(map[string]string{"public/b.txt": "beta\n", "private/c.txt": "gamma\n"})
	one, two := w.vm(p, "same", smallVM), w.vm(q, "same", smallVM)
	w.start()

	// The same alias in two partitions: ambiguous alone, both usable at once.
	if _, err := w.Client.ShowVM(w.ctx(10*time.Second), "same"); api.CodeOf(err) != api.CodeAmbiguous {
		t.Errorf("an alias that two partitions use: %v", err)
	}
	early, err := w.Client.Grant(w.ctx(time.Minute), api.GrantRequest{VM: one.String(), Capability: fs("ro", p, "/kept"), Label: "kept", Persist: true, Wait: true})
	w.must(err)
	if early.State != api.GrantPending {
		t.Errorf("a persistent grant to a VM that does not run is %s", early.State)
	}
	if _, err := w.tryGrant(one, fs("ro", p, "/docs"), ""); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "does not run") {
		t.Errorf("a grant to a VM that does not run: %v", err)
	}
	guests := w.boot(one, two)
	w.eventually(10*time.Second, func() error { return guests[0].reads("kept", "kept") })
	docs := w.grant(one, fs("ro", p, "/docs"), "docs")
	w.grant(two, fs("ro", q, "/private"), "private")
	w.grant(one, fs("ro", q, "/public"), "public")
	for _, r := range []struct {
		g           *guest
		label, want string
	}{{guests[0], "docs", "alpha"}, {guests[0], "public", "beta"}, {guests[1], "private", "gamma"}} {
		if err := r.g.reads(r.label, r.want); err != nil {
			t.Error(err)
		}
	}
	if _, err := w.tryGrant(one, fs("ro", q, "/private"), ""); api.CodeOf(err) != api.CodeDenied {
		t.Errorf("another partition's private file: %v", err)
	}
	if _, err := w.Client.StartVM(w.ctx(10*time.Second), one.String()); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("a second start: %v", err)
	}

	t.Run("console", func(t *testing.T) {
		conn, err := w.Client.Console(w.ctx(10*time.Second), one.String())
		w.must(err)
		defer conn.Close()
		guests[0].sh("echo words on the console > /dev/console")
		_ = conn.SetReadDeadline(time.Now().Add(w.Stretched(10 * time.Second)))
		var seen []byte
		for buf := make([]byte, 4096); !bytes.Contains(seen, []byte("words on the console")); {
			n, err := conn.Read(buf)
			seen = append(seen, buf[:n]...)
			if err != nil {
				t.Fatalf("%v after %q", err, seen)
			}
		}
	})
	t.Run("a second broker", func(t *testing.T) {
		second, err := harness.New(w.Tools, w.Dir)
		w.must(err)
		err = second.StartBroker(w.ctx(20 * time.Second))
		if err == nil {
			_ = second.StopBroker(syscall.SIGKILL)
			t.Fatal("a second broker serves the same state directory")
		}
		if !strings.Contains(err.Error(), "another broker") && !strings.Contains(err.Error(), "in use") {
			t.Errorf("it does not say why it ends: %v", err)
		}
		if h, err := w.Client.Health(w.ctx(10 * time.Second)); err != nil || !h.Ready || h.PID != w.BrokerPID() {
			t.Errorf("the first broker after that: %+v, %v", h, err)
		}
	})

	// The power button, which a guest answers by powering off.
	began := time.Now()
	grace := w.Stretched(20 * time.Second).Seconds()
	_, err = w.Client.StopVM(w.ctx(time.Minute), one.String(), api.StopRequest{GraceSeconds: &grace})
	w.must(err)
	t.Logf("a graceful stop took %v", time.Since(began).Round(10*time.Millisecond))
	w.exitSays(one, "the VM ended: stopped", "the VM ended: the guest shut down")
	w.eventually(10*time.Second, func() error { return w.ended(docs.ID, "the VM ended") })
	if now, err := w.Client.ShowGrant(w.ctx(10*time.Second), early.ID.String()); err != nil || now.State != api.GrantActive {
		t.Errorf("the persistent grant is %s (%s) after a stop, %v", now.State, now.Reason, err)
	}

	// By force, which is quick.
	began = time.Now()
	now := 0.0
	_, err = w.Client.StopVM(w.ctx(time.Minute), two.String(), api.StopRequest{GraceSeconds: &now})
	w.must(err)
	if took := time.Since(began); took > w.Stretched(5*time.Second) {
		t.Errorf("a stop by force took %v", took)
	}
	w.exitSays(two, "stopped by force")

	// What persists is there again, across stops, runs and brokers.
	w.must(w.StopBroker(syscall.SIGTERM))
	w.start()
	g := w.boot(one)[0]
	w.eventually(10*time.Second, func() error { return g.reads("kept", "kept") })
	if err := g.absent("/run/spectrum/fs/docs"); err != nil {
		t.Error(err)
	}
	kept, err := w.Client.ShowGrant(w.ctx(10*time.Second), early.ID.String())
	if err != nil || kept.State != api.GrantActive || kept.Observed.State != "attached" {
		t.Errorf("the persistent grant is %s and %s, %v", kept.State, kept.Observed.State, err)
	}
	g.off("poweroff -f")
	w.stopped(one)
	if now, err := w.Client.ShowGrant(w.ctx(10*time.Second), early.ID.String()); err != nil || now.State != api.GrantActive {
		t.Errorf("the persistent grant is %s (%s) after the guest powered off, %v", now.State, now.Reason, err)
	}
	w.revoke(early.ID)
	if _, err := os.Stat(w.VMDir(one)); !os.IsNotExist(err) {
		t.Errorf("the VM's runtime directory: %v, want it gone", err)
	}
}

// reboot has the guest reboot at once; the connection breaks with it.
func (g *guest) reboot() { g.off("reboot -f") }

func (g *guest) off(line string) {
	ctx, cancel := context.WithTimeout(context.Background(), g.w.Stretched(2*time.Second))
	defer cancel()
	_, _ = g.Run(ctx, "sh", "-c", line)
}

func (g *guest) await() {
	g.w.t.Helper()
	g.w.must(g.Await(g.w.ctx(time.Minute)))
}

// nextRun waits until the VM is in another run than the one named.
func (w *world) nextRun(vm uuid.UUID, run string) string {
	w.t.Helper()
	var v api.VM
	w.eventually(30*time.Second, func() error {
		if v = w.show(vm); v.Instance == run || v.State != api.VMRunning {
			return fmt.Errorf("the VM is %s in run %s", v.State, v.Instance)
		}
		return nil
	})
	return v.Instance
}

func (w *world) stopped(vm uuid.UUID) {
	w.t.Helper()
	w.eventually(20*time.Second, func() error {
		if v := w.show(vm); v.State != api.VMStopped {
			return fmt.Errorf("the VM is %s", v.State)
		}
		return nil
	})
}

// declared is the VM's one live grant that its definition declares, once it
// is there.
func (w *world) declared(vm uuid.UUID, run string) api.Grant {
	w.t.Helper()
	var out api.Grant
	w.eventually(20*time.Second, func() error {
		live, err := w.Client.ListGrants(w.ctx(10*time.Second), api.GrantFilter{VM: vm.String()})
		if err != nil {
			return err
		}
		i := slices.IndexFunc(live, func(g api.Grant) bool { return g.Declared && g.State == api.GrantActive })
		if i < 0 {
			return fmt.Errorf("run %s has no declared grant, but %d others", run, len(live))
		}
		out = live[i]
		return nil
	})
	if out.Label != "declared" || out.Observed.State != "attached" {
		w.t.Errorf("the declared grant is %q and %s", out.Label, out.Observed.State)
	}
	return out
}

// exitSays asserts what the last end of a VM's run is recorded as.
func (w *world) exitSays(vm uuid.UUID, words ...string) {
	w.t.Helper()
	exits := w.audit(api.EventQuery{VM: vm.String(), Types: []string{"vm.exited"}})
	if len(exits) == 0 {
		w.t.Error("the end of the VM's run is not on record")
		return
	}
	data := string(exits[len(exits)-1].Data)
	if !slices.ContainsFunc(words, func(s string) bool { return strings.Contains(data, s) }) {
		w.t.Errorf("the VM's end is recorded as %s, want one of %q", data, words)
	}
}
