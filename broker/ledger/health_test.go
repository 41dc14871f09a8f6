package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
)

// opened is a ledger in a directory that no cleanup checks, with one grant.
func opened(t *testing.T) (l *Ledger, path string, grant uuid.UUID) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "spoilt")
	l = open(t, dir, clock.NewFake())
	grant = uuid.New()
	put(t, l, requested(grant, GrantRecord{Capability: capability(t, "/a")}))
	return l, filepath.Join(dir, fileName), grant
}

// TestFileTakenAway deletes, moves and replaces the ledger's files while it is
// open. SQLite writes on to what has no name; the ledger must not say that it is
// durable, and must not begin a new one.
func TestFileTakenAway(t *testing.T) {
	for name, c := range map[string]struct {
		take func(path string) error
		says string
	}{
		"the database is deleted": {os.Remove, "ledger.db was deleted"},
		"the log is deleted":      {func(p string) error { return os.Remove(p + "-wal") }, "ledger.db-wal was deleted"},
		"the database is replaced by a copy": {func(p string) error {
			raw, err := os.ReadFile(p)
			return errors.Join(err, os.WriteFile(p+".new", raw, 0o600), os.Rename(p+".new", p))
		}, "ledger.db was replaced"},
		"another file stands there": {func(p string) error {
			return errors.Join(os.WriteFile(p+".new", nil, 0o600), os.Rename(p+".new", p))
		}, "ledger.db was replaced"},
	} {
		for how, notice := range map[string]func(l *Ledger) error{
			"by looking": func(l *Ledger) error { return l.Check() },
			"by writing": func(l *Ledger) error { return try(l, Event{Type: BrokerStarted, Actor: someone}) },
		} {
			t.Run(name+", noticed "+how, func(t *testing.T) {
				l, path, _ := opened(t)
				seq, _ := l.Head()
				if err := l.Check(); err != nil {
					t.Fatal(err)
				}
				if err := c.take(path); err != nil {
					t.Fatal(err)
				}
				if err := notice(l); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got %v, want %q", err, c.says)
				}
				if err := try(l, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrPoisoned) {
					t.Errorf("then: %v", err)
				}
				if now, _ := l.Head(); now != seq {
					t.Errorf("%d events are shown, and %d were acknowledged", now, seq)
				}
				if what, remedy := Diagnose(l.Trouble()); !strings.Contains(what, c.says) || !strings.Contains(remedy, "ledger restore") {
					t.Errorf("a person is told %q, %q", what, remedy)
				}
			})
		}
	}
}

// TestNoNewLedger reopens a ledger whose database is gone, was cut short or is
// another one, and wants no, and no file made; with the right one back it goes on.
func TestNoNewLedger(t *testing.T) {
	l, path, grant := opened(t)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(context.Background()); !errors.Is(err, ErrGone) {
		t.Errorf("with no database: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a new database: %v", err)
	}
	other := open(t, t.TempDir(), clock.NewFake())
	for range 5 {
		put(t, other, Event{Type: BrokerStarted, Actor: someone})
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(other.o.Dir, fileName), path); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(context.Background()); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("with another one's database: %v", err)
	}
	if err := os.Rename(path, filepath.Join(other.o.Dir, fileName)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(context.Background()); err != nil {
		t.Fatal(err)
	}
	if l.Trouble() != nil || stateOf(l, grant) != Pending {
		t.Errorf("it is back, and there is %v, %s", l.Trouble(), stateOf(l, grant))
	}
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	if err := os.Rename(filepath.Dir(path), filepath.Join(filepath.Dir(filepath.Dir(path)), "moved")); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(); !errors.Is(err, ErrGone) {
		t.Errorf("with the directory away: %v", err)
	}
	if err := os.Rename(filepath.Join(filepath.Dir(filepath.Dir(path)), "moved"), filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(context.Background()); err != nil {
		t.Error(err)
	}
}

// TestCutShort wants a reopened ledger to miss what was acknowledged.
func TestCutShort(t *testing.T) {
	l, path, _ := opened(t)
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	if err := l.Reopen(context.Background()); err != nil { // so that the database has it all
		t.Fatal(err)
	}
	spoil(t, filepath.Dir(path), "DELETE FROM events WHERE seq = 3")
	broken, _ := errors.AsType[*ChainError](l.Reopen(context.Background()))
	if broken == nil || broken.Problem != BrokenAnchor || broken.Seq != 3 {
		t.Errorf("got %v", broken)
	}
	if err := try(l, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrPoisoned) {
		t.Errorf("then: %v", err)
	}
}

// TestChangedUnderneath changes what was loaded, with a fresh hash or without,
// and wants whoever reads it told, and nothing written from then on.
func TestChangedUnderneath(t *testing.T) {
	for name, c := range map[string]struct {
		edit  func(t *testing.T, dir string)
		after uint64 // where the reader starts
		seq   uint64
	}{
		"a flipped bit": {func(t *testing.T, dir string) {
			body, _ := row(t, dir, 3)
			body[len(body)-3] ^= 1
			spoil(t, dir, "UPDATE events SET body = ? WHERE seq = 3", body)
		}, 0, 3},
		"with a fresh hash":                  {fresh(3), 0, 4},
		"with a fresh hash, and read alone":  {fresh(3), 2, 4},
		"with a fresh hash, and read behind": {fresh(3), 3, 4},
		"the newest, with a fresh hash":      {fresh(5), 4, 5},
		"deleted":                            {func(t *testing.T, dir string) { spoil(t, dir, "DELETE FROM events WHERE seq = 4") }, 0, 4},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := written(t)
			l := open(t, dir, clock.NewFake())
			c.edit(t, dir)
			_, err := l.Events(c.after, EventFilter{}, 0)
			broken, _ := errors.AsType[*ChainError](err)
			if broken == nil || broken.Seq != c.seq {
				t.Fatalf("got %v, want event %d", err, c.seq)
			}
			if err := try(l, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrPoisoned) || !strings.Contains(err.Error(), fmt.Sprintf("event %d", c.seq)) {
				t.Errorf("then: %v", err)
			}
			if what, remedy := Diagnose(l.Trouble()); !strings.Contains(what, fmt.Sprintf("event %d", c.seq)) || !strings.Contains(remedy, "ledger restore") {
				t.Errorf("a person is told %q, %q", what, remedy)
			}
			if err := l.Reopen(context.Background()); err == nil {
				t.Error("it was reopened")
			}
		})
	}
}

// fresh edits an event, so that its own hash fits.
func fresh(seq int) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		t.Helper()
		body, _ := row(t, dir, seq)
		edited := bytes.Replace(body, []byte(`"r"`), []byte(`"s"`), 1)
		if bytes.Equal(edited, body) {
			t.Fatalf("event %d has nothing to edit", seq)
		}
		hash := hashRecord(edited)
		spoil(t, dir, "UPDATE events SET body = ?, hash = ? WHERE seq = ?", edited, hash[:], seq)
	}
}

// TestReopenBesideReaders: who reads the newest state holds up nothing. Who reads
// an older one keeps the log from being made durable, and then it is not enough
// to sync it, as a sync after one that failed says yes to what was lost.
func TestReopenBesideReaders(t *testing.T) {
	l, path, _ := opened(t)
	reader := func() (*sql.Tx, func()) {
		db, err := sql.Open("sqlite", path)
		if err != nil {
			t.Fatal(err)
		}
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if err := tx.QueryRow("SELECT count(*) FROM events").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return tx, func() { _ = errors.Join(tx.Rollback(), db.Close()) }
	}
	_, newest := reader()
	if err := l.Reopen(context.Background()); err != nil {
		t.Errorf("beside a reader of the newest state: %v", err)
	}
	newest()
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	_, older := reader()
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	began := time.Now()
	err := l.Reopen(context.Background())
	if err == nil || !strings.Contains(err.Error(), "somebody still reads an older state") {
		t.Errorf("beside a reader of an older state: %v after %v", err, time.Since(began))
	}
	older()
	if err := l.Reopen(context.Background()); err != nil {
		t.Error(err)
	}
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
}

// TestReopenWhileTidying wants neither to wait for the other for ever.
func TestReopenWhileTidying(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	done := make(chan error, 1)
	go func() {
		var err error
		for range 30 {
			err = errors.Join(err, l.Reopen(context.Background()), try(l, Event{Type: BrokerStarted, Actor: someone}))
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		case <-time.After(time.Minute):
			t.Fatal("they wait for each other")
		default:
			l.tidied()
		}
	}
}

// TestLogTakenAway wants what the log held, after its name is gone, in the database.
func TestLogTakenAway(t *testing.T) {
	l, path, grant := opened(t)
	if _, err := l.Events(0, EventFilter{}, 0); err != nil { // so that a reader is connected
		t.Fatal(err)
	}
	if err := os.Rename(path+"-wal", path+".away"); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(); !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
	if err := l.Reopen(context.Background()); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, filepath.Dir(path), clock.NewFake())
	if seq, _ := l.Head(); seq != 5 || stateOf(l, grant) != Pending {
		t.Errorf("%d events, and the grant is %q", seq, stateOf(l, grant))
	}
}

// TestDiagnose wants the words for each trouble to say what to do.
func TestDiagnose(t *testing.T) {
	for _, c := range []struct {
		err          error
		what, remedy string
	}{
		{fmt.Errorf("x: %w", unix.ENOSPC), "full", "make room"},
		{fmt.Errorf("x: %w", unix.EROFS), "read-only", "mount it writable"},
		{fmt.Errorf("x: %w", unix.EIO), "fails", "kernel's log"},
		{&ChainError{Seq: 7, Problem: BrokenHash}, "event 7", "ledger restore"},
		{fmt.Errorf("x: %w", ErrGone), "gone", "move it back"},
		{errors.New("unheard of"), "unheard of", "broker's log"},
	} {
		if what, remedy := Diagnose(c.err); !strings.Contains(what, c.what) || !strings.Contains(remedy, c.remedy) {
			t.Errorf("%v: %q, %q", c.err, what, remedy)
		}
	}
	if what, remedy := Diagnose(nil); what != "" || remedy != "" {
		t.Errorf("nothing: %q, %q", what, remedy)
	}
}
