package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"spectrum-os.org/broker/broker/api"
)

// TestRestoreTakesEverythingBack restores a backup while a VM runs and reads
// what it was granted: before the backup, and after it. The next broker takes
// both away. Then an older copy is put back by hand, and refused.
func TestRestoreTakesEverythingBack(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "more/a.txt": "beta\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]
	backup := filepath.Join(t.TempDir(), "backup.db")
	run := func(want int, args ...string) string {
		t.Helper()
		out, code := w.cap(args...)
		if code != want {
			t.Fatalf("spectrum-cap %s: exit %d, want %d: %s", strings.Join(args, " "), code, want, out)
		}
		return out
	}

	before := w.grant(vm, fs("ro", p, "/docs"), "before")
	run(0, "ledger", "backup", "--state", w.StateDir(), backup)
	if out := run(1, "ledger", "backup", "--state", w.StateDir(), backup); !strings.Contains(out, "exists already") {
		t.Errorf("onto a backup that exists: %s", out)
	}
	after := w.grant(vm, fs("ro", p, "/more"), "after")
	served := append(w.serving(vm, before.ID), w.serving(vm, after.ID)...)
	if out := run(1, "ledger", "restore", "--state", w.StateDir(), backup); !strings.Contains(out, "in use by another broker") || !strings.Contains(out, "stop the broker first") {
		t.Errorf("beside a broker: %s", out)
	}
	instance := w.show(vm).Instance
	w.must(w.StopBroker(syscall.SIGTERM))
	w.must(errors.Join(g.reads("before", "alpha"), g.reads("after", "beta")))

	if out := run(0, "ledger", "restore", "--state", w.StateDir(), backup); !strings.Contains(out, "epoch 2") || !strings.Contains(out, "1 grants end") {
		t.Errorf("it says %s", out)
	}
	w.start()
	if now := w.show(vm); now.Instance != instance || now.State != api.VMRunning {
		t.Errorf("the VM is %s in run %s, want it running in %s", now.State, now.Instance, instance)
	}
	w.must(w.ended(before.ID, "the ledger was restored from a backup"))
	if _, err := w.Client.ShowGrant(w.ctx(10*time.Second), after.ID.String()); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("a grant made after the backup: %v", err)
	}
	w.allDead(served)
	w.nothingServed(vm)
	for _, label := range []string{"before", "after"} {
		if g.reads(label, "") == nil {
			t.Errorf("the guest still reads %s", label)
		}
	}
	if h, err := w.Client.Health(w.ctx(10 * time.Second)); err != nil || h.Epoch != 2 {
		t.Errorf("the epoch is %d, %v", h.Epoch, err)
	}
	fresh := w.grant(vm, fs("ro", p, "/docs"), "fresh")
	w.must(g.reads("fresh", "alpha"))
	if out := run(0, "ledger", "verify", "--state", w.StateDir()); !strings.Contains(out, "intact") {
		t.Errorf("it says %s", out)
	}

	// By hand.
	w.must(w.StopBroker(syscall.SIGTERM))
	kept, err := filepath.Glob(filepath.Join(w.StateDir(), "ledger.db.replaced-*Z"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("what was replaced is kept as %v, %v", kept, err)
	}
	aside := t.TempDir()
	move := func(from, to string) {
		t.Helper()
		for _, name := range []string{"ledger.db", "ledger.db-wal", "ledger.db-shm"} {
			if err := os.Rename(filepath.Join(from, name), filepath.Join(to, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
	}
	move(w.StateDir(), aside)
	w.must(os.Link(kept[0], filepath.Join(w.StateDir(), "ledger.db")))
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(30*time.Second))
	defer cancel()
	err = w.StartBroker(ctx)
	if err == nil || !strings.Contains(err.Error(), "the ledger is not the one that was there") || !strings.Contains(err.Error(), "spectrum-cap ledger restore --state") {
		t.Errorf("with an older copy the broker's start says %v", err)
	}
	w.must(g.reads("fresh", "alpha"))
	for _, name := range []string{"ledger.db", "ledger.db-wal", "ledger.db-shm"} {
		_ = os.Remove(filepath.Join(w.StateDir(), name))
	}
	move(aside, w.StateDir())
	w.start()
	if got := w.settled("fresh"); got.ID != fresh.ID || got.State != api.GrantActive {
		t.Errorf("with the right one back, the grant is %s", got.State)
	}
}

// TestRevokedKey takes away what a key signed for, in the world.
func TestRevokedKey(t *testing.T) {
	w := newWorld(t)
	p := w.partition(map[string]string{"docs/a.txt": "alpha\n", "more/a.txt": "beta\n"})
	vm := w.vm(p, "reader", smallVM)
	w.start()
	g := w.boot(vm)[0]
	old := w.grant(vm, fs("ro", p, "/docs"), "old")
	if out, code := w.cap("keys", "rotate"); code != 0 {
		t.Fatalf("keys rotate: exit %d: %s", code, out)
	}
	fresh := w.grant(vm, fs("ro", p, "/more"), "fresh")
	w.must(errors.Join(g.reads("old", "alpha"), g.reads("fresh", "beta")))
	keys, err := w.Client.ListKeys(w.ctx(10 * time.Second))
	w.must(err)
	served := w.serving(vm, old.ID)
	if out, code := w.cap("keys", "revoke", keys[0].KID, "--reason", "stolen"); code != 0 || !strings.Contains(out, "is revoked; key "+keys[1].KID+" signs") {
		t.Fatalf("keys revoke: exit %d: %s", code, out)
	}
	w.allDead(served)
	w.must(w.ended(old.ID, "signing key "+keys[0].KID+" was revoked: stolen"))
	if g.reads("old", "alpha") == nil {
		t.Error("the guest still reads what the revoked key signed for")
	}
	w.must(g.reads("fresh", "beta"))
	w.crash()
	w.start()
	if got := w.settled("fresh"); got.ID != fresh.ID || got.State != api.GrantActive {
		t.Errorf("after a crash what the other key signs for is %s", got.State)
	}
	now, err := w.Client.ListKeys(w.ctx(10 * time.Second))
	if err != nil || len(now) != 2 || now[0].State != api.KeyRevoked || now[1].State != api.KeyCurrent {
		t.Errorf("the keys are %+v, %v", now, err)
	}
}
