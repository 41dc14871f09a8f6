package ledger

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// restorable is a state directory with a backup of it, and with what happened
// since.
type restorable struct {
	t                   *testing.T
	dir, backup         string
	before, after, gone uuid.UUID // grants: in the backup; made since; revoked since
	name                string    // of a partition, in the backup
	was                 Mark      // when it was closed
	from                BackupReport
}

func newRestorable(t *testing.T) *restorable {
	t.Helper()
	r := &restorable{t: t, dir: filepath.Join(t.TempDir(), "spoilt"), backup: filepath.Join(t.TempDir(), "backup.db"), name: "work"}
	l, err := Open(context.Background(), Options{Dir: r.dir, Kinds: testKinds, Clock: clock.NewFake()})
	must(t, err)
	must(t, l.Mark())
	put(t, l, NewKey(someone, testKey(t)))
	put(t, l, Event{Type: NameSet, Actor: someone, Partition: partition, Data: JSON(NameData{"work"})},
		Event{Type: VMBound, Actor: someone, VM: holder, Partition: partition})
	r.before, r.gone = granted(t, l, "/before"), granted(t, l, "/gone")
	r.from, err = Backup(context.Background(), r.dir, r.backup)
	must(t, err)
	r.after = granted(t, l, "/after")
	put(t, l, NewChange(GrantRevoking, someone, r.gone, Change{Reason: "asked to"}))
	must(t, l.Close())
	r.was = theMark(t, r.dir)
	return r
}

func (r *restorable) options(file string) RestoreOptions {
	return RestoreOptions{
		Dir: r.dir, File: file, Clock: clock.NewFake(), Actor: someone,
		StageKey: func(Mark) (ed25519.PublicKey, error) { return testKey(r.t), nil },
		KeepKey:  func() error { return nil },
	}
}

// whole is what must be true of the directory when the ledger can be opened
// again: it is the old one as it was, or the restored one, with nothing in force.
func (r *restorable) whole() (restored bool) {
	r.t.Helper()
	l, err := Open(context.Background(), Options{Dir: r.dir, Kinds: testKinds, Clock: clock.NewFake()})
	must(r.t, err)
	defer func() { must(r.t, l.Close()) }()
	now := clock.NewFake().Now()
	l.View(func(s *State) {
		restored = s.Epoch() == 2
		g, ok := s.Grant(r.gone)
		if !ok || !g.State.Ended() || s.Live(r.gone, now) == nil {
			r.t.Errorf("what was revoked is %s", g.State)
		}
		g, _ = s.Grant(r.before)
		if restored != (g.State == Revoking) || restored && g.Reason != restoredReason {
			r.t.Errorf("epoch %d, and a grant of the backup is %s (%s)", s.Epoch(), g.State, g.Reason)
		}
		if _, known := s.Grant(r.after); known == restored {
			r.t.Errorf("epoch %d, and a grant made after the backup is known: %v", s.Epoch(), known)
		}
		if s.Names()[partition] != r.name {
			r.t.Errorf("the names are %v", s.Names())
		}
		if p, bound := s.Binding(holder); !bound || p != partition {
			r.t.Errorf("the VM is bound to %v, %v", p, bound)
		}
		if k, ok := s.CurrentKey(); !ok || k.Epoch != s.Epoch() || k.Revoked != k.Retired {
			r.t.Errorf("the current key is %+v, %v", k, ok)
		}
		if !restored {
			if seq, hash := l.Head(); (Anchor{seq, hash}) != r.was.Anchor {
				r.t.Errorf("the old ledger ends at %d, and did at %d", seq, r.was.Seq)
			}
		}
	})
	if m := theMark(r.t, r.dir); (m.Epoch == 2) != restored {
		r.t.Errorf("epoch 2: %v, and the mark is %+v", restored, m)
	}
	return restored
}

func TestRestore(t *testing.T) {
	r := newRestorable(t)
	report, err := Restore(context.Background(), r.options(r.backup))
	must(t, err)
	if report.Mark.Epoch != 2 || report.Ended != 2 || report.From != r.from.Mark || report.Events != r.from.Events || report.KID == "" {
		t.Errorf("reported %+v", report)
	}
	if !r.whole() {
		t.Error("it is the old ledger")
	}
	// What was there is kept, whole.
	old, err := VerifyFile(context.Background(), report.Replaced, r.was.Anchor)
	if err != nil || old.Broken != nil || old.Mark() != r.was {
		t.Errorf("what was there is %+v, %v; want %+v", old, err, r.was)
	}
	if info, err := os.Stat(report.Replaced); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("it is kept with mode %v, %v", info.Mode(), err)
	}
	l := open(t, r.dir, clock.NewFake())
	events, err := l.Events(report.From.Seq, EventFilter{}, 3)
	must(t, err)
	if len(events) != 2 || events[0].Type != LedgerRestored || events[1].Type != KeyCreated {
		t.Errorf("after the backup's events come %v", events)
	}
	// What was revoked stays so, and the rest can be: the table of moves goes on.
	put(t, l, NewChange(GrantRevoked, someone, r.before, Change{}))
	if err := try(l, NewChange(GrantActive, someone, r.gone, Change{})); !errors.Is(err, ErrIllegalMove) {
		t.Errorf("an ended grant was made active: %v", err)
	}
	must(t, l.Close())
	// Putting back what was there is noticed.
	must(t, foldLog(context.Background(), filepath.Join(r.dir, fileName)))
	must(t, os.Rename(report.Replaced, filepath.Join(r.dir, fileName)))
	if err := tryOpen(r.dir); !errors.Is(err, ErrSwapped) {
		t.Errorf("the replaced ledger is put back: %v", err)
	}
	// And a second restoration goes beyond every epoch there was.
	again, err := Restore(context.Background(), r.options(r.backup))
	must(t, err)
	if again.Mark.Epoch != 3 {
		t.Errorf("the next epoch is %d, want 3", again.Mark.Epoch)
	}
	must(t, tryOpen(r.dir))
}

// TestRestoreCutShort does every prefix of a restoration's steps, each leaving
// on the disk what a kill would, and starts.
func TestRestoreCutShort(t *testing.T) {
	total := len((&restoration{}).steps())
	swapped := 0
	for n := range total + 1 {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			r := newRestorable(t)
			x := &restoration{o: r.options(r.backup)}
			for _, s := range x.steps()[:n] {
				must(t, s.do(context.Background()))
			}
			restored := r.whole()
			if restored {
				swapped++
			}
			if r.whole() != restored {
				t.Error("the second start finds another ledger than the first")
			}
			// It can be done again, or for the first time.
			if _, err := Restore(context.Background(), r.options(r.backup)); err != nil {
				t.Fatal(err)
			}
			l, err := Open(context.Background(), Options{Dir: r.dir, Kinds: testKinds, Clock: clock.NewFake()})
			must(t, err)
			l.View(func(s *State) {
				if want := uint64(2); restored && s.Epoch() != want+1 || !restored && s.Epoch() != want {
					t.Errorf("restored once more it is in epoch %d", s.Epoch())
				}
			})
			must(t, l.Close())
			if _, err := os.Lstat(filepath.Join(r.dir, restoringName)); err == nil {
				t.Error("a copy is left over")
			}
		})
	}
	if swapped != 3 {
		t.Errorf("%d of %d prefixes give the restored ledger, want those that include the swap", swapped, total+1)
	}
}

func TestRestoreRefuses(t *testing.T) {
	whole := func(r *restorable) string { return r.backup }
	for name, c := range map[string]struct {
		file func(r *restorable) string
		want error
		says string
	}{
		"a tampered backup": {func(r *restorable) string {
			change(r.t, r.backup, `UPDATE events SET body = CAST(substr(body, 1, length(body) - 1) || X'00' AS BLOB) WHERE seq = 5`)
			return r.backup
		}, nil, "broken at event 5: hash mismatch"},
		"a backup with an event taken out": {func(r *restorable) string {
			change(r.t, r.backup, `DELETE FROM events WHERE seq = 3`)
			return r.backup
		}, nil, "broken at event 4: gap"},
		"a newer schema": {func(r *restorable) string {
			change(r.t, r.backup, `PRAGMA user_version = 99`)
			return r.backup
		}, ErrNewerSchema, "its schema is 99"},
		"a database that is no ledger": {func(r *restorable) string {
			change(r.t, r.backup, `PRAGMA application_id = 7`)
			return r.backup
		}, ErrNotLedger, "application id"},
		"a trigger in it": {func(r *restorable) string {
			change(r.t, r.backup, `CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM events; END`)
			return r.backup
		}, ErrNotLedger, "other things"},
		"no database": {func(r *restorable) string {
			must(r.t, os.WriteFile(r.backup, bytes.Repeat([]byte("not a database "), 100), 0o600))
			return r.backup
		}, ErrNotLedger, "not a database"},
		"an empty file": {func(r *restorable) string {
			must(r.t, os.Truncate(r.backup, 0))
			return r.backup
		}, ErrNotLedger, "empty"},
		"half a file": {func(r *restorable) string {
			info, _ := os.Stat(r.backup)
			must(r.t, os.Truncate(r.backup, info.Size()/2))
			return r.backup
		}, nil, "malformed"},
		"nothing":     {func(r *restorable) string { return r.backup + "x" }, os.ErrNotExist, "no such file"},
		"a directory": {func(r *restorable) string { return r.dir }, ErrNotLedger, "not a regular file"},
		"another ledger's": {func(r *restorable) string {
			return newRestorable(r.t).backup
		}, ErrOtherLedger, "and the one here is"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRestorable(t)
			file := c.file(r)
			_, err := Restore(context.Background(), r.options(file))
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %v saying %q", err, c.want, c.says)
			}
			if r.whole() {
				t.Error("it was restored all the same")
			}
		})
	}
	t.Run("a running broker", func(t *testing.T) {
		r := newRestorable(t)
		l := open(t, r.dir, clock.NewFake())
		_, err := Restore(context.Background(), r.options(whole(r)))
		if !errors.Is(err, ErrLocked) {
			t.Errorf("got %v", err)
		}
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
	})
	t.Run("no key", func(t *testing.T) {
		r := newRestorable(t)
		o := r.options(whole(r))
		o.StageKey = func(Mark) (ed25519.PublicKey, error) { return nil, syscall.ENOSPC }
		if _, err := Restore(context.Background(), o); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "no new key could be made") {
			t.Errorf("got %v", err)
		}
		if r.whole() {
			t.Error("it was restored all the same")
		}
	})
}

func change(t *testing.T, file, query string) {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	must(t, err)
	_, err = db.ExecContext(context.Background(), query)
	must(t, errors.Join(err, db.Close()))
}

// TestRestoreMends: a state directory that is refused is what a restoration is
// for, and its own database will do.
func TestRestoreMends(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(r *restorable)
		file  func(r *restorable) string
		epoch uint64
	}{
		"the database is gone": {func(r *restorable) {
			for _, n := range []string{fileName, fileName + "-wal", fileName + "-shm"} {
				_ = os.Remove(filepath.Join(r.dir, n))
			}
		}, nil, 2},
		"the database is garbage, with a log beside it": {func(r *restorable) {
			must(r.t, os.WriteFile(filepath.Join(r.dir, fileName), bytes.Repeat([]byte("garbage "), 2000), 0o600))
			must(r.t, os.WriteFile(filepath.Join(r.dir, fileName+"-wal"), bytes.Repeat([]byte("garbage "), 2000), 0o600))
		}, nil, 2},
		"the database is another ledger's": {func(r *restorable) {
			aside(r.t, r.dir)
			must(r.t, os.Rename(newRestorable(r.t).backup, filepath.Join(r.dir, fileName)))
		}, nil, 2},
		"the anchor is gone": {func(r *restorable) {
			must(r.t, os.Remove(filepath.Join(r.dir, markName)))
		}, func(r *restorable) string { return filepath.Join(r.dir, fileName) }, 2},
		"the anchor is garbage": {func(r *restorable) {
			must(r.t, os.WriteFile(filepath.Join(r.dir, markName), []byte("?"), 0o600))
		}, func(r *restorable) string { return filepath.Join(r.dir, fileName) }, 2},
		"the anchor knows of a later epoch": {func(r *restorable) {
			m := r.was
			m.Epoch = 41
			must(r.t, writeMark(r.dir, m))
		}, nil, 42},
		"everything is gone": {func(r *restorable) {
			must(r.t, os.RemoveAll(r.dir))
		}, nil, 2},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRestorable(t)
			c.spoil(r)
			file := r.backup
			if c.file != nil {
				file = c.file(r)
			}
			report, err := Restore(context.Background(), r.options(file))
			must(t, err)
			if report.Mark.Epoch != c.epoch {
				t.Errorf("it is in epoch %d, want %d", report.Mark.Epoch, c.epoch)
			}
			l, err := Open(context.Background(), Options{Dir: r.dir, Kinds: testKinds, Clock: clock.NewFake()})
			must(t, err)
			l.View(func(s *State) {
				for _, id := range []uuid.UUID{r.before, r.after, r.gone} {
					if err := s.Live(id, clock.NewFake().Now()); err == nil {
						t.Errorf("grant %s is in force", id)
					}
				}
			})
			must(t, l.Close())
			if v, err := Verify(context.Background(), r.dir); err != nil || v.Broken != nil {
				t.Errorf("it is not whole: %+v, %v", v.Broken, err)
			}
		})
	}
}

func TestBackup(t *testing.T) {
	r := newRestorable(t)
	info, err := os.Stat(r.backup)
	if err != nil || info.Mode() != 0o600 || info.Size() != r.from.Bytes {
		t.Errorf("the backup is %v, %v", info, err)
	}
	if _, err := Backup(context.Background(), r.dir, r.backup); !errors.Is(err, ErrExists) {
		t.Errorf("onto a file that exists: %v", err)
	}
	must(t, os.Symlink("nowhere", r.backup+".link"))
	if _, err := Backup(context.Background(), r.dir, r.backup+".link"); !errors.Is(err, ErrExists) {
		t.Errorf("onto a link: %v", err)
	}
	if _, err := Backup(context.Background(), r.dir, filepath.Join(t.TempDir(), "no", "b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("into no directory: %v", err)
	}
	if _, err := Backup(context.Background(), t.TempDir(), r.backup+"2"); err == nil {
		t.Error("a backup was made of nothing")
	}
	// One of a swapped ledger, or of a broken one, would be of use to nobody.
	cutLast(t, r.dir)
	if _, err := Backup(context.Background(), r.dir, r.backup+"3"); err == nil || !strings.Contains(err.Error(), "there is nothing to back up") {
		t.Errorf("of a ledger that was cut short: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(r.backup), "*"))
	hidden, _ := filepath.Glob(filepath.Join(filepath.Dir(r.backup), ".*"))
	if err != nil || len(left) != 2 || len(hidden) != 0 {
		t.Errorf("failing left %v %v, %v", left, hidden, err)
	}
}

// TestBackupWhileAllWrite: a backup taken while 64 writers write is whole, holds
// what was acknowledged before it was begun, and nothing by halves.
func TestBackupWhileAllWrite(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	must(t, l.Mark())
	put(t, l, NewKey(someone, testKey(t)))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				id := uuid.New()
				if err := try(l, requested(id, GrantRecord{Capability: capability(t, "/a")}), NewChange(GrantActive, someone, id, Change{})); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	to := t.TempDir()
	for i := range 3 {
		seq, hash := l.Head()
		file := filepath.Join(to, fmt.Sprint(i))
		report, err := Backup(context.Background(), dir, file)
		must(t, err)
		found, err := VerifyFile(context.Background(), file, Anchor{seq, hash})
		if err != nil || found.Broken != nil || found.Mark() != report.Mark || found.Events != report.Events {
			t.Errorf("the backup is %+v, %v; reported %+v", found, err, report)
		}
		if report.Events%2 != 0 { // created and key, and pairs
			t.Errorf("%d events: half an Update is in the backup", report.Events)
		}
	}
	close(stop)
	wg.Wait()
}

// TestFullDisk backs up to and restores on a disk that fills up at every size:
// there is no half of a file under the backup's name, and the state directory
// has the old ledger or the new one.
func TestFullDiskForBackupAndRestore(t *testing.T) {
	small := filepath.Join(t.TempDir(), "small")
	must(t, os.Mkdir(small, 0o700))
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
		t.Skipf("SKIP needs to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(small, 0)) })
	fill := filepath.Join(small, "fill")
	r := newRestorable(t)
	must(t, foldLog(context.Background(), filepath.Join(r.dir, fileName)))
	failed, done := 0, 0
	for free := 0; free <= 300; free += 12 {
		dir := filepath.Join(small, "spoilt")
		must(t, os.RemoveAll(dir))
		must(t, os.RemoveAll(fill))
		must(t, os.Mkdir(dir, 0o700))
		for _, name := range []string{fileName, markName} {
			body, err := os.ReadFile(filepath.Join(r.dir, name))
			if err != nil {
				continue
			}
			must(t, os.WriteFile(filepath.Join(dir, name), body, 0o600))
		}
		stuff(t, small, fill, int64(free)<<10)
		here := *r
		here.dir = dir
		_, err := Restore(context.Background(), here.options(r.backup))
		must(t, os.RemoveAll(fill))
		restored := here.whole()
		switch {
		case err == nil && !restored:
			t.Errorf("%d KiB free: it said that it was restored", free)
		case err == nil:
			done++
		default:
			failed++
		}
		backup := filepath.Join(small, "backup")
		stuff(t, small, fill, int64(free)<<10)
		_, err = Backup(context.Background(), r.dir, backup)
		if _, missing := os.Stat(backup); (err == nil) != (missing == nil) {
			t.Errorf("%d KiB free: %v, and the backup is there: %v", free, err, missing == nil)
		}
		if err == nil {
			if v, err := VerifyFile(context.Background(), backup); err != nil || v.Broken != nil {
				t.Errorf("%d KiB free: the backup is %+v, %v", free, v.Broken, err)
			}
			must(t, os.Remove(backup))
		}
		if hidden, _ := filepath.Glob(filepath.Join(small, ".ledger*")); len(hidden) > 0 {
			t.Errorf("%d KiB free: left %v", free, hidden)
		}
	}
	if failed == 0 || done == 0 {
		t.Errorf("%d failed and %d were done: the disk was not the matter", failed, done)
	}
}

// stuff fills the disk but for so many bytes.
func stuff(t *testing.T, disk, file string, free int64) {
	t.Helper()
	var st syscall.Statfs_t
	must(t, syscall.Statfs(disk, &st))
	n := int64(st.Bavail)*st.Bsize - free
	if n > 0 {
		must(t, os.WriteFile(file, make([]byte, n), 0o600))
	}
}
