package ledger

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"modernc.org/sqlite"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// occupied is a ledger whose lead is held until release is called, with n updates
// that wait for it. Each of them sends its error.
func occupied(t *testing.T, l *Ledger, n int, fn func(tx *Tx) error) (release func(), cancel []context.CancelFunc, errs []chan error) {
	t.Helper()
	held, free := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = l.run(context.Background(), &update{alone: func() error { close(held); <-free; return nil }})
	})
	<-held
	for range n {
		ctx, stop := context.WithCancel(context.Background())
		err := make(chan error, 1)
		cancel, errs = append(cancel, stop), append(errs, err)
		wg.Go(func() {
			_, e := l.Update(ctx, fn)
			err <- e
		})
	}
	for waiting := 0; waiting < n; time.Sleep(time.Millisecond) {
		l.queue.mu.Lock()
		waiting = len(l.queue.waiting)
		l.queue.mu.Unlock()
	}
	t.Cleanup(wg.Wait)
	return sync.OnceFunc(func() { close(free) }), cancel, errs
}

func birthOf(tx *Tx) error {
	return tx.Append(NewGrant(someone, uuid.New(), holder, partition, GrantRecord{Capability: anything}))
}

var anything, _ = testKinds.Parse("fs:ro:"+partition.String()+":/a", nil)

// TestGivenUpWhileWaiting wants an update whose caller goes before its turn to
// have left nothing, and to hold up nobody.
func TestGivenUpWhileWaiting(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	release, cancel, errs := occupied(t, l, 3, birthOf)
	cancel[1]()
	if err := <-errs[1]; !errors.Is(err, ErrNotRecorded) || !errors.Is(err, context.Canceled) {
		t.Errorf("who went away: %v", err)
	}
	release()
	for _, i := range []int{0, 2} {
		if err := <-errs[i]; err != nil {
			t.Errorf("who stayed: %v", err)
		}
	}
	if seq, _ := l.Head(); seq != 3 {
		t.Errorf("the ledger has %d events, want its birth and two grants", seq)
	}
}

// TestClosedWhileWaiting wants everybody told.
func TestClosedWhileWaiting(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	release, _, errs := occupied(t, l, 3, birthOf)
	closed := make(chan error)
	go func() { closed <- l.Close() }()
	for _, err := range errs {
		if err := <-err; !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
	select {
	case err := <-closed:
		t.Errorf("the ledger is closed under somebody who leads: %v", err)
	case <-time.After(10 * time.Millisecond):
	}
	release()
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// faulty is a clock that breaks off who asks it, when it is told to.
type faulty struct {
	clock.Clock
	broken atomic.Bool
}

func (c *faulty) Now() capabilities.Instant {
	if c.broken.Load() {
		panic("mistake")
	}
	return c.Clock.Now()
}

// TestMistakeInACommit breaks off a commit by a panic where none can be. Those who
// share it must not wait for ever, nor believe anything.
func TestMistakeInACommit(t *testing.T) {
	c := &faulty{Clock: clock.NewFake()}
	l := open(t, t.TempDir(), c)
	release, _, errs := occupied(t, l, 2, birthOf)
	// Who waits first leads, and its goroutine is the one that meets the mistake.
	leader := &update{fn: birthOf, turn: make(chan bool, 1)}
	l.queue.mu.Lock()
	l.queue.waiting = slices.Insert(l.queue.waiting, 0, leader)
	l.queue.mu.Unlock()
	c.broken.Store(true)
	release()
	if !<-leader.turn {
		t.Fatal("it is not its turn")
	}
	func() {
		defer func() {
			if v := recover(); v != "mistake" {
				t.Errorf("recovered %v", v)
			}
		}()
		defer l.queue.leave()
		l.lead(l.queue.gather(leader))
	}()
	for _, err := range errs {
		if err := <-err; !errors.Is(err, ErrUnknownOutcome) {
			t.Errorf("who shared the commit: %v", err)
		}
	}
	c.broken.Store(false)
	if err := try(l, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrPoisoned) {
		t.Errorf("what comes after it: %v", err)
	}
	if err := l.Reopen(context.Background()); err != nil {
		t.Fatal(err)
	}
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	if seq, _ := l.Head(); seq != 2 {
		t.Errorf("the ledger has %d events, want its birth and the last", seq)
	}
}

// TestLogStaysShort writes several times what the log is to hold.
func TestLogStaysShort(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	size := func() int64 {
		info, err := os.Stat(filepath.Join(dir, fileName+"-wal"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	if n := size(); n != reservedLog {
		t.Errorf("the log has %d bytes from the start, want %d", n, reservedLog)
	}
	const most = 6 * tidyLog
	for range most {
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
		// A machine that is busy does not leave the one who tidies behind: a commit
		// that has to does it itself, at longestLog.
		if n := l.store.frames.Load(); n > tidyLog+tidyLog/8 {
			time.Sleep(time.Millisecond)
		}
	}
	if n := size(); n > most*4096/2 {
		t.Errorf("the log has %d bytes after %d commits: it is never begun anew", n, most)
	}
	if !sqlite.FdatasyncEnabled() {
		t.Error("commits sync by fsync")
	}
}

// TestReserveKeepsFrames lengthens a log that holds what the database does not,
// as a reader kept it from being moved.
func TestReserveKeepsFrames(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	for range 20 {
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
	}
	wal := filepath.Join(dir, fileName+"-wal")
	tx, err := l.store.readers.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := tx.QueryRowContext(context.Background(), "SELECT count(*) FROM events").Scan(&n); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		put(t, l, Event{Type: BrokerStarted, Actor: someone})
	}
	before, err := os.ReadFile(wal)
	if err != nil {
		t.Fatal(err)
	}
	// What it holds ends well before that.
	if err := os.Truncate(wal, 256<<10); err == nil {
		if err := reserveLog(wal); err != nil {
			t.Fatal(err)
		}
	}
	after, err := os.ReadFile(wal)
	if err != nil || len(after) != reservedLog || !bytes.Equal(after[:256<<10], before[:256<<10]) {
		t.Errorf("lengthening the log changed what it held: %d bytes, %v", len(after), err)
	}
	_ = tx.Rollback()
}
