package disks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/powercut"
)

// refusals asks until the answer is no, and wants the reason in it and what to
// do. It returns the labels that were refused: none of them may ever be in force.
func (w *world) refusals(what, remedy string) (refused []string) {
	w.t.Helper()
	// What room is left is used up.
	for i := 0; ; i++ {
		if i == 5000 {
			w.t.Fatal("a bad disk refuses nothing")
		}
		if _, err := w.Client.SetName(w.ctx(20*time.Second), fmt.Sprintf("n%d", i), w.part.ID); err != nil {
			break
		}
	}
	for range 40 {
		label, _, err := w.ask(w.ctx(20*time.Second), true)
		if err == nil {
			continue // what had room
		}
		if api.CodeOf(err) != api.CodeUnavailable || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), remedy) {
			w.t.Errorf("the refusal says %q (%s); want %q, %q", err, api.CodeOf(err), what, remedy)
		}
		refused = append(refused, label)
		if len(refused) == 2 {
			return refused
		}
	}
	w.t.Fatal("a bad disk refuses no grant")
	return nil
}

// healthy wants health to be ok, or degraded with a reason.
func (w *world) healthy(says string) error {
	h, err := w.Client.Health(w.ctx(10 * time.Second))
	problems := strings.Join(h.Problems, "; ")
	switch {
	case err != nil:
		return err
	case says == "" && (h.Status != "ok" || problems != ""):
		return fmt.Errorf("health is %s: %s", h.Status, problems)
	case says != "" && (h.Status != "degraded" || !strings.Contains(problems, says)):
		return fmt.Errorf("health is %s: %q; want degraded, and %q", h.Status, problems, says)
	}
	return nil
}

// active is a grant that the VM's shim serves, and the processes that do.
func (w *world) active() (api.Grant, []int) {
	w.t.Helper()
	_, g, err := w.ask(w.ctx(30*time.Second), false)
	w.must(err)
	pids := w.serving(g.ID)
	if len(pids) == 0 || len(alive(pids)) == 0 {
		w.t.Fatalf("nothing serves grant %s: %v", g.ID, pids)
	}
	return g, pids
}

// cutsUnrecorded takes a grant back that cannot be recorded, and wants it cut in
// the world, said so, and noted where a restart finds it.
func (w *world) cutsUnrecorded(g api.Grant, pids []int, what string) {
	w.t.Helper()
	_, err := w.Client.Revoke(w.ctx(40*time.Second), api.RevokeRequest{IDs: []string{g.ID.String()}, Wait: true})
	if api.CodeOf(err) != api.CodeUnavailable || !strings.Contains(err.Error(), "access was cut, but") || !strings.Contains(err.Error(), what) {
		w.t.Errorf("the revocation says %v", err)
	}
	if left := alive(pids); len(left) > 0 {
		w.t.Errorf("the grant is still served by %v", left)
	}
	if _, err := os.Stat(w.tombstone(g.ID)); err != nil {
		w.t.Errorf("no tombstone: %v", err)
	}
}

func (w *world) tombstone(id uuid.UUID) string {
	return filepath.Join(w.Dir, "run", "tombstones", id.String())
}

// ended wants a grant's end on record, and none of the refused ones in force.
func (w *world) ended(g api.Grant, refused []string) {
	w.t.Helper()
	w.eventually("its end on record", func() error {
		grants, err := w.grants(w.ctx(10 * time.Second))
		if err != nil {
			return err
		}
		for _, label := range refused {
			if s := grants[label].State; s == api.GrantPending || s == api.GrantActive {
				return fmt.Errorf("grant %s was refused and is %s", label, s)
			}
		}
		if s := grants[g.Label].State; s != api.GrantRevoked {
			return fmt.Errorf("grant %s is %s", g.Label, s)
		}
		if _, err := os.Stat(w.tombstone(g.ID)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("its tombstone: %w", err)
		}
		return nil
	})
}

// TestBadDisks has a disk fail in each way that ends by itself: nothing is
// granted, health and the answer say why and what to do, a revocation cuts access
// although it cannot be recorded, and with the disk well again the broker goes on
// without a restart; and the same once more, with the broker killed meanwhile.
func TestBadDisks(t *testing.T) {
	for name, c := range map[string]struct {
		spoil        func(d *powercut.Disk)
		what, remedy string
	}{
		"full":      {func(d *powercut.Disk) { d.Room(2000) }, "disk is full", "make room on it"},
		"read-only": {func(d *powercut.Disk) { d.ReadOnly() }, "file system is read-only", "mount it writable"},
		"write errors": {
			func(d *powercut.Disk) {
				d.Break(powercut.Fault{Op: powercut.Write, Name: "ledger.db*", Err: syscall.EIO})
			},
			"disk fails", "see the kernel's log",
		},
		"sync errors, and what was to be synced is lost": {
			func(d *powercut.Disk) { d.Break(powercut.Fault{Op: powercut.Sync, Err: syscall.EIO, Lost: true}) },
			"disk fails", "see the kernel's log",
		},
		"torn writes": {
			func(d *powercut.Disk) {
				d.Break(powercut.Fault{Op: powercut.Write, Name: "ledger.db*", After: 1, Err: syscall.EIO, Torn: 100})
			},
			"disk fails", "see the kernel's log",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.must(w.start())
			_, err := w.Client.StartVM(w.ctx(30*time.Second), w.vm.String())
			w.must(err)
			w.must(w.healthy(""))

			g, pids := w.active()
			c.spoil(w.disk)
			refused := w.refusals(c.what, c.remedy)
			w.eventually("health", func() error { return w.healthy(c.what) })
			w.cutsUnrecorded(g, pids, c.what)
			w.disk.Heal()
			w.ended(g, refused)
			w.eventually("health", func() error { return w.healthy("") })

			g, pids = w.active()
			c.spoil(w.disk)
			refused = append(refused, w.refusals(c.what, c.remedy)...)
			w.cutsUnrecorded(g, pids, c.what)
			w.must(w.StopBroker(syscall.SIGKILL))
			w.disk.Heal()
			w.must(w.start())
			w.ended(g, refused)
			if left := w.serving(g.ID); len(alive(left)) > 0 {
				t.Errorf("served again by %v", left)
			}
			w.active()
			w.must(w.healthy(""))
			w.must(w.verify())
		})
	}
}

// TestSyncThatFailedOnce is what trips databases up: one fsync fails, what it was
// to store is lost although it can be read, and the next one succeeds. What is
// acknowledged from then on must not rest on it.
func TestSyncThatFailedOnce(t *testing.T) {
	for _, name := range []string{"ledger.db-wal", "ledger.db"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.must(w.start())
			var kept []string
			give := func(n int) {
				for range n {
					if label, _, err := w.ask(w.ctx(20*time.Second), true); err == nil {
						kept = append(kept, label)
					}
				}
			}
			give(3)
			w.disk.Break(powercut.Fault{Op: powercut.Sync, Name: name, Times: 1, Err: syscall.EIO, Lost: true})
			if name == "ledger.db" {
				// The database is synced when the log is moved into it: at a start.
				w.must(w.StopBroker(syscall.SIGKILL))
				if err := w.start(); err == nil || !strings.Contains(err.Error(), "see the kernel's log") {
					t.Errorf("it starts on a sync that failed: %v", err)
				}
				w.must(w.start())
			} else {
				give(1)
			}
			if w.disk.Hits() != 1 {
				t.Fatalf("%d syncs failed", w.disk.Hits())
			}
			w.eventually("a grant", func() error {
				before := len(kept)
				if give(1); len(kept) == before {
					return errors.New("refused")
				}
				return nil
			})
			give(3)
			last := w.disk.Recent()
			w.unplug()
			w.disk = w.disk.Cut(choices(1), powercut.LoseAll)
			w.plug()
			w.must(w.start())
			grants, err := w.grants(w.ctx(20 * time.Second))
			w.must(err)
			for _, label := range kept {
				if s := grants[label].State; s != api.GrantPending && s != api.GrantActive {
					t.Errorf("grant %s was acknowledged and is %q after a power cut; the last changes: %s", label, s, last)
				}
			}
		})
	}
}

// TestFullDuringCheckpoint has a disk with room for the log and none for the
// database: it goes on as long as that is safe, and what was acknowledged is there
// when there is room again.
func TestFullDuringCheckpoint(t *testing.T) {
	w := newWorld(t)
	w.must(w.start())
	w.disk.Break(powercut.Fault{Op: powercut.Write, Name: "ledger.db", Err: syscall.ENOSPC})
	acknowledged, revoked := "", ""
	for i := range 900 {
		label, g, err := w.ask(w.ctx(20*time.Second), true)
		w.must(err)
		if i == 0 {
			acknowledged = label
			continue
		}
		_, err = w.Client.Revoke(w.ctx(20*time.Second), api.RevokeRequest{IDs: []string{g.ID.String()}})
		w.must(err)
		if revoked = label; w.disk.Hits() > 0 {
			break
		}
	}
	if w.disk.Hits() == 0 {
		t.Fatal("nothing was moved into the database")
	}
	w.must(w.StopBroker(syscall.SIGKILL))
	if err := w.start(); err == nil || !strings.Contains(err.Error(), "disk is full; make room on it") {
		t.Errorf("with a database that cannot be written: %v", err)
	}
	w.disk.Heal()
	w.must(w.start())
	grants, err := w.grants(w.ctx(20 * time.Second))
	w.must(err)
	if s := grants[acknowledged].State; s != api.GrantPending {
		t.Errorf("the grant is %q", s)
	}
	if s := grants[revoked].State; s != api.GrantRevoked && s != api.GrantRevoking {
		t.Errorf("the revoked one is %q", s)
	}
}

// TestLogThatCannotBeCut: to make the log shorter is a nicety.
func TestLogThatCannotBeCut(t *testing.T) {
	w := newWorld(t)
	w.must(w.start())
	label, _, err := w.ask(w.ctx(20*time.Second), true)
	w.must(err)
	w.must(w.StopBroker(syscall.SIGKILL))
	w.disk.Break(powercut.Fault{Op: powercut.Truncate, Name: "ledger.db-wal", Err: syscall.EIO})
	w.must(w.start())
	grants, err := w.grants(w.ctx(20 * time.Second))
	w.must(err)
	if s := grants[label].State; s != api.GrantPending {
		t.Errorf("the grant is %q", s)
	}
	_, _, err = w.ask(w.ctx(20*time.Second), true)
	w.must(err)
}

// flip changes a bit of a text in the database, wherever it is: pages keep what
// was on them.
func (w *world) flip(text string) {
	w.t.Helper()
	raw, err := w.disk.ReadFile("state/ledger.db")
	w.must(err)
	found := false
	for at := 0; ; at++ {
		next := bytes.Index(raw[at:], []byte(text))
		if next < 0 {
			break
		}
		at += next
		found = true
		w.must(w.disk.Flip("state/ledger.db", at))
	}
	if !found {
		w.t.Fatalf("the database does not hold %q", text)
	}
}

// TestFlippedAtRest: a broker refuses to start, and says at which event and what
// to do.
func TestFlippedAtRest(t *testing.T) {
	w := newWorld(t)
	w.must(w.start())
	for range 5 {
		_, _, err := w.ask(w.ctx(20*time.Second), true)
		w.must(err)
	}
	w.must(w.StopBroker(syscall.SIGTERM))
	w.flip("grant-0003")
	defer func() { _ = w.StopBroker(syscall.SIGKILL) }()
	for range 2 { // it does not get used to it
		err := w.start()
		if err == nil || !strings.Contains(err.Error(), "broken at event") || !strings.Contains(err.Error(), "spectrum-cap ledger restore") {
			t.Errorf("it says %v", err)
		}
	}
}

// TestFlippedUnderneath damages an event that was loaded long ago. Who reads it is
// told, and from then on nothing is granted; a revocation cuts access all the same.
func TestFlippedUnderneath(t *testing.T) {
	w := newWorld(t)
	w.must(w.start())
	_, err := w.Client.StartVM(w.ctx(30*time.Second), w.vm.String())
	w.must(err)
	_, damaged, err := w.ask(w.ctx(20*time.Second), true)
	w.must(err)
	g, pids := w.active()
	// So that the database holds it, and not only the log, and on a page that is
	// not written again.
	for i := range 40 {
		_, err := w.Client.SetName(w.ctx(20*time.Second), fmt.Sprintf("name-%d", i), w.part.ID)
		w.must(err)
	}
	w.restart()
	w.flip(damaged.Label)
	_, _, err = w.ask(w.ctx(20*time.Second), true) // so that no reader trusts what it read before
	w.must(err)
	w.eventually("the damage is noticed", func() error {
		if _, err := w.Client.Audit(w.ctx(20*time.Second), api.EventQuery{}); err == nil {
			return errors.New("the audit gives back what was changed")
		}
		return nil
	})
	refused := w.refusals("broken at event", "spectrum-cap ledger restore")
	w.eventually("health", func() error { return w.healthy("broken at event") })
	w.cutsUnrecorded(g, pids, "broken at event")
	w.must(w.StopBroker(syscall.SIGKILL))
	if err := w.start(); err == nil || !strings.Contains(err.Error(), "spectrum-cap ledger restore") {
		t.Errorf("it starts with a damaged ledger: %v", err)
	}
	if _, err := os.Stat(w.tombstone(g.ID)); err != nil {
		t.Errorf("its tombstone is gone: %v", err)
	}
	w.flip("f" + damaged.Label[1:]) // 'g' with its last bit flipped; and back
	w.must(w.start())
	w.ended(g, refused)
}

// restart ends the broker in good order and starts it again; its VMs run on.
func (w *world) restart() {
	w.t.Helper()
	w.must(w.StopBroker(syscall.SIGTERM))
	w.must(w.start())
}

// TestDeletedUnderneath takes the database away from a running broker. SQLite
// would write on to a file without a name.
func TestDeletedUnderneath(t *testing.T) {
	for _, file := range []string{"ledger.db", "ledger.db-wal"} {
		t.Run(file, func(t *testing.T) {
			w := newWorld(t)
			w.must(w.start())
			_, err := w.Client.StartVM(w.ctx(30*time.Second), w.vm.String())
			w.must(err)
			g, pids := w.active()
			path := filepath.Join(w.State, file)
			w.must(os.Rename(path, path+".away"))
			refused := w.refusals(file+" was deleted", "spectrum-cap ledger restore")
			w.eventually("health", func() error { return w.healthy("was deleted") })
			w.cutsUnrecorded(g, pids, "was deleted")
			time.Sleep(2 * time.Second) // it tries to mend it by itself meanwhile
			if file == "ledger.db" {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("a new database was begun: %v", err)
				}
				w.must(os.Rename(path+".away", path))
			}
			w.ended(g, refused)
			w.eventually("health", func() error { return w.healthy("") })
			w.active()
			w.restart()
			w.must(w.verify())
			if _, err := w.grants(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
}
