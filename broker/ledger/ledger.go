package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// Options says where the ledger is and what it needs.
type Options struct {
	Dir      string // state directory; made with mode 0700 where it is missing
	Kinds    *capabilities.Kinds
	Clock    clock.Clock
	Log      *slog.Logger // nil: nothing is logged
	ReadOnly bool         // no lock, no writing; the state is that of the moment of opening

	synchronous string // of SQLite, in tests that show what depends on it; empty: what durability says
}

// maxBatch is how many Updates share one commit at most.
const maxBatch = 256

// Ledger is an open event log and the state that follows from it. All methods
// may be called at once.
type Ledger struct {
	o      Options
	lock   *os.File
	folder *folder // the writer's

	updates chan *update
	reopen  chan chan error
	closing chan struct{}
	closed  sync.Once
	done    chan struct{}

	mu       sync.RWMutex // guards what follows
	store    *store
	root     *layer
	poisoned error

	subMu sync.Mutex
	subs  map[chan struct{}]struct{}
}

// update is one Update that waits for the writer.
type update struct {
	fn       func(tx *Tx) error
	events   []Event
	err      error
	panicked any
	done     chan struct{}
}

// call runs fn in the writer. A panic is the caller's: it must not end the
// writer, and with it everybody's updates.
func (u *update) call(tx *Tx) {
	defer func() { u.panicked = recover() }()
	u.err = u.fn(tx)
}

// Open opens or creates the ledger in o.Dir, verifies its chain and loads its
// state. It fails with ErrLocked, ErrNewerSchema, ErrNotLedger or a
// *ChainError.
func Open(ctx context.Context, o Options) (*Ledger, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	l := &Ledger{
		o: o, updates: make(chan *update), reopen: make(chan chan error), closing: make(chan struct{}),
		done: make(chan struct{}), subs: map[chan struct{}]struct{}{},
	}
	if !o.ReadOnly {
		if err := prepareDir(o.Dir); err != nil {
			return nil, err
		}
		lock, err := takeLock(o.Dir)
		if err != nil {
			return nil, err
		}
		l.lock = lock
	}
	failpoint.Hit("ledger.lock.after")
	if err := l.load(ctx); err != nil {
		if l.lock != nil {
			_ = l.lock.Close()
		}
		return nil, err
	}
	if o.ReadOnly {
		close(l.done)
		return l, nil
	}
	go l.write()
	return l, nil
}

func (l *Ledger) synchronous() string { return cmp.Or(l.o.synchronous, durability()) }

// load reads the file into a fresh state.
func (l *Ledger) load(ctx context.Context) error {
	now := l.o.Clock.Now()
	s, err := openStore(ctx, l.o.Dir, l.o.ReadOnly, l.synchronous(), now.Wall)
	if err != nil {
		return err
	}
	root := newLayer(nil)
	root.due = &deadlines{bootID: now.BootID}
	f := &folder{newInterner()}
	if _, err := load(ctx, s, f, root); err != nil {
		return errors.Join(err, s.close())
	}
	root.due.prune(root)
	root.meta.boot = int64(now.Boot)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.store, l.root, l.folder, l.poisoned = s, root, f, nil
	return nil
}

// Close ends the writer and closes the file. Updates that wait fail with
// ErrClosed.
func (l *Ledger) Close() error {
	l.closed.Do(func() { close(l.closing) })
	<-l.done
	l.mu.Lock()
	s, lock := l.store, l.lock
	l.store, l.lock = nil, nil
	l.mu.Unlock()
	var err error
	if s != nil {
		err = s.close()
	}
	// Last, so that the next broker finds the file closed.
	if lock != nil {
		err = errors.Join(err, lock.Close())
	}
	return err
}

// Update runs fn in the writer and returns the events that it appended once
// they are durable. fn sees what earlier Updates appended, also those that
// share its commit; its error drops its own events only and is returned. fn
// must be quick and must not call the ledger.
//
// It fails with ErrNotRecorded where nothing was written, with
// ErrUnknownOutcome where the commit failed, and with ErrPoisoned from then on
// until Reopen.
func (l *Ledger) Update(ctx context.Context, fn func(tx *Tx) error) ([]Event, error) {
	if l.o.ReadOnly {
		return nil, ErrReadOnly
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotRecorded, err)
	}
	u := &update{fn: fn, done: make(chan struct{})}
	select {
	case l.updates <- u:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrNotRecorded, ctx.Err())
	case <-l.closing:
		return nil, ErrClosed
	}
	// From here on the outcome is the writer's to tell.
	<-u.done
	if u.panicked != nil {
		panic(u.panicked)
	}
	return u.events, u.err
}

// write is the one goroutine that changes the file.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		select {
		case first := <-l.updates:
			l.commit(l.gather(first))
		case answer := <-l.reopen:
			answer <- l.again()
		case <-l.closing:
			return
		}
	}
}

// gather takes all updates that wait already: they share one commit, and one
// fsync.
func (l *Ledger) gather(first *update) []*update {
	batch := []*update{first}
	for len(batch) < maxBatch {
		select {
		case u := <-l.updates:
			batch = append(batch, u)
		default:
			return batch
		}
	}
	return batch
}

func (l *Ledger) commit(batch []*update) {
	defer func() {
		for _, u := range batch {
			close(u.done)
		}
	}()
	if err := l.Poisoned(); err != nil {
		for _, u := range batch {
			u.err = fmt.Errorf("%w: %w", ErrPoisoned, err)
		}
		return
	}
	top := newLayer(l.root)
	var records []record
	for _, u := range batch {
		tx := &Tx{ledger: l, layer: newLayer(top)}
		tx.now = tx.State().Effective(l.o.Clock.Now())
		if u.call(tx); u.err != nil || u.panicked != nil {
			continue
		}
		tx.layer.merge()
		u.events = tx.events
		records = append(records, tx.records...)
	}
	if len(records) == 0 {
		return
	}
	begun, err := l.store.write(records)
	if err != nil {
		// All of them, as also a refusal may rest on what was not written.
		l.failed(batch, begun, err)
		return
	}
	l.mu.Lock()
	top.merge()
	l.mu.Unlock()
	failpoint.Hit("ledger.merge.after")
	l.wake()
}

// failed answers the updates of a commit that did not succeed.
func (l *Ledger) failed(batch []*update, begun bool, err error) {
	kind := ErrNotRecorded
	if begun {
		kind = ErrUnknownOutcome
		l.poison(err)
		l.o.Log.Error("the ledger could not be written; it refuses everything until it is reopened", "err", err)
	}
	for _, u := range batch {
		u.events, u.err = nil, fmt.Errorf("%w: %w", kind, err)
	}
}

// poison keeps the first reason.
func (l *Ledger) poison(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.poisoned == nil {
		l.poisoned = err
	}
}

// Reopen reads the file again after an unknown outcome. On success the state
// is what is on the disk, and Updates are taken again.
func (l *Ledger) Reopen(ctx context.Context) error {
	if l.o.ReadOnly {
		return ErrReadOnly
	}
	answer := make(chan error, 1)
	select {
	case l.reopen <- answer:
		return <-answer
	case <-ctx.Done():
		return ctx.Err()
	case <-l.closing:
		return ErrClosed
	}
}

func (l *Ledger) again() error {
	l.mu.RLock()
	old := l.store
	l.mu.RUnlock()
	// Before anything is read: a commit that failed may have left its
	// transaction open, and here it ends. Until the file was read again nothing
	// is written, whatever the reason to reopen.
	l.poison(errors.New("the ledger is being reopened"))
	if err := old.retire(); err != nil {
		l.o.Log.Warn("the ledger's old connection could not be closed", "err", err)
	}
	failpoint.Hit("ledger.reopen.before")
	if err := l.load(context.Background()); err != nil {
		return fmt.Errorf("cannot reopen the ledger: %w", err)
	}
	l.wake()
	return old.close()
}

// Poisoned is the error that made the ledger refuse to write, or nil.
func (l *Ledger) Poisoned() error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.poisoned
}

// View runs fn on the committed state. fn must be quick: commits wait for it.
func (l *Ledger) View(fn func(s *State)) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	fn(&State{l.root, l.o.Kinds})
}

// Head is the last committed event's sequence number and hash.
func (l *Ledger) Head() (uint64, Hash) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.root.meta.seq, l.root.meta.hash
}

// Events are committed events after the given sequence number that f selects,
// in order, at most limit of them (0: all). Each is checked against its hash.
func (l *Ledger) Events(after uint64, f EventFilter, limit int) ([]Event, error) {
	l.mu.RLock()
	s, head := l.store, l.root.meta.seq
	if s != nil {
		s.reading.Add(1)
	}
	l.mu.RUnlock()
	if s == nil {
		return nil, ErrClosed
	}
	defer s.reading.Done()
	if after >= head {
		return nil, nil
	}
	var out []Event
	errEnough := errors.New("enough")
	next := after + 1
	err := s.each(context.Background(), int64(next), func(row int64, body, stored []byte) error {
		seq := uint64(row)
		if seq != next {
			return &ChainError{Seq: next, Problem: BrokenGap, Detail: "it is gone since it was loaded"}
		}
		next++
		var e entry
		hash := hashRecord(body)
		if string(hash[:]) != string(stored) {
			return &ChainError{Seq: seq, Problem: BrokenHash, Detail: "it was changed since it was loaded"}
		}
		if err := decodeEvent(body, &e); err != nil {
			return &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: err.Error()}
		}
		if e.Seq != seq {
			return &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: fmt.Sprintf("it says that it is event %d", e.Seq)}
		}
		if f.match(&e.Event) {
			v, err := e.public(hash)
			if err != nil {
				return &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: err.Error()}
			}
			out = append(out, v)
		}
		if seq == head || limit > 0 && len(out) >= limit {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return out, nil
	}
	if err == nil {
		err = &ChainError{Seq: next, Problem: BrokenGap, Detail: "it is gone since it was loaded"}
	}
	return nil, fmt.Errorf("cannot read the ledger's events: %w", err)
}

// Subscribe returns a channel that receives after commits, until ctx ends.
// Wake-ups are coalesced, never lost: take the channel, then look.
func (l *Ledger) Subscribe(ctx context.Context) <-chan struct{} {
	c := make(chan struct{}, 1)
	l.subMu.Lock()
	l.subs[c] = struct{}{}
	l.subMu.Unlock()
	context.AfterFunc(ctx, func() {
		l.subMu.Lock()
		delete(l.subs, c)
		l.subMu.Unlock()
	})
	return c
}

func (l *Ledger) wake() {
	l.subMu.Lock()
	defer l.subMu.Unlock()
	for c := range l.subs {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}
