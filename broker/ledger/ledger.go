package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

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
	// Observe is told of each transaction by the writer, and must be quick. May be
	// nil.
	Observe func(Commit)

	synchronous string // of SQLite, in tests that show what depends on it; empty: what durability says
}

// maxBatch is how many Updates share one commit at most.
const maxBatch = 256

// Ledger is an open event log and the state that follows from it. All methods
// may be called at once.
type Ledger struct {
	o      Options
	lock   *os.File
	folder *folder // of who leads the queue
	queue  *queue

	ctx    context.Context //nolint:containedctx // ends with the ledger, and its goroutine
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wrote  chan struct{} // tells tidy that the log may be long
	marks  chan struct{} // tells keepMarks that a mark is due

	rotating sync.Mutex // held while an archive is made

	mu       sync.RWMutex // guards what follows
	store    *store
	root     *layer
	poisoned error
	trouble  error // of the last attempt to write or reopen
	marked   Mark  // zero: no mark is kept

	markMu   sync.Mutex // one mark is written at a time
	markedAt time.Time

	subMu sync.Mutex
	subs  map[chan struct{}]struct{}
}

// Open opens or creates the ledger in o.Dir, verifies its chain and loads its
// state. It fails with ErrLocked, ErrNewerSchema, ErrNotLedger or a
// *ChainError.
func Open(ctx context.Context, o Options) (*Ledger, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	l := &Ledger{o: o, queue: newQueue(), wrote: make(chan struct{}, 1), marks: make(chan struct{}, 1), subs: map[chan struct{}]struct{}{}}
	l.ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
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
	if !o.ReadOnly {
		l.keepMark(true)
		l.wg.Go(l.tidy)
		l.wg.Go(l.keepMarks)
	}
	return l, nil
}

func (l *Ledger) synchronous() string { return cmp.Or(l.o.synchronous, durability()) }

// load reads the file into a fresh state, of which the acknowledged events must
// be part.
func (l *Ledger) load(ctx context.Context, acknowledged ...Anchor) error {
	now := l.o.Clock.Now()
	w, err := newWitness(l.o.Dir)
	if err != nil {
		return err
	}
	if err := w.gone(filepath.Join(l.o.Dir, fileName)); err != nil {
		return err
	}
	s, err := openStore(ctx, l.o.Dir, l.o.ReadOnly, l.synchronous(), now.Wall)
	if err != nil {
		return err
	}
	root := newLayer(nil)
	root.due = &deadlines{bootID: now.BootID}
	f := &folder{newInterner()}
	_, err = load(ctx, s, f, root, w, acknowledged...)
	if err == nil {
		err = w.judge(&root.meta)
	}
	if err == nil && !w.has && !l.o.ReadOnly && len(root.meta.keys) > 0 {
		// Whoever made its first key had marked it before.
		err = &SwapError{Dir: l.o.Dir, Found: &Mark{root.meta.ledger, root.meta.epoch, Anchor{root.meta.seq, root.meta.hash}}, Detail: "its anchor is gone"}
	}
	if err != nil {
		return errors.Join(err, s.close())
	}
	root.due.prune(root)
	root.meta.boot = int64(now.Boot)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.store, l.root, l.folder, l.poisoned, l.trouble, l.marked = s, root, f, nil, nil, w.mark
	return nil
}

// Close waits for the commit that is under way and closes the file. Updates that
// wait fail with ErrClosed.
func (l *Ledger) Close() error {
	l.queue.close()
	l.cancel()
	l.wg.Wait()
	if !l.o.ReadOnly {
		l.keepMark(true)
	}
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

// Update runs fn while nobody else writes and returns the events that it
// appended, grant.requested without its Data, once they are durable. fn sees what earlier Updates appended, also those that
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
	u := &update{fn: fn}
	if err := l.run(ctx, u); err != nil {
		return nil, err
	}
	if u.panicked != nil {
		panic(u.panicked)
	}
	return u.events, nil
}

// commit runs updates and stores what they append, all at once. Who leads the
// queue calls it, and is the only one to change the file.
func (l *Ledger) commit(batch []*update) {
	if err := l.Poisoned(); err != nil {
		for _, u := range batch {
			u.err = fmt.Errorf("%w: %w", ErrPoisoned, cmp.Or(l.Trouble(), err))
		}
		return
	}
	top := newLayer(l.root)
	now := l.o.Clock.Now()
	var records []record
	for _, u := range batch {
		tx := &Tx{ledger: l, layer: top}
		if len(batch) > 1 {
			// What this one appends can be forgotten without the rest.
			tx.layer = newLayer(top)
		}
		tx.now = tx.State().Effective(now)
		if u.call(tx); u.err != nil || u.panicked != nil {
			continue
		}
		if tx.layer != top {
			tx.layer.merge()
		}
		u.events = tx.events
		records = append(records, tx.records...)
	}
	if len(records) == 0 {
		return
	}
	began := time.Now()
	begun, err := l.store.record(records)
	took := time.Since(began)
	defer func() { l.observe(took, batch, err) }()
	if err != nil {
		// All of them, as also a refusal may rest on what was not written.
		l.failed(batch, begun, err)
		return
	}
	l.publish(top)
	failpoint.Hit("ledger.merge.after")
	l.wake()
	if l.markDue(false) {
		select {
		case l.marks <- struct{}{}:
		default:
		}
	}
	if l.store.frames.Add(framesOf(records)) >= tidyLog {
		select {
		case l.wrote <- struct{}{}:
		default:
		}
	}
}

// publish makes what was committed the state that everybody sees.
func (l *Ledger) publish(top *layer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	top.merge()
	l.trouble = nil
}

// failed answers the updates of a commit that did not succeed.
func (l *Ledger) failed(batch []*update, begun bool, err error) {
	kind := ErrNotRecorded
	if begun {
		kind = ErrUnknownOutcome
		l.poison(err)
		l.o.Log.Error("the ledger could not be written; it refuses everything until it is reopened", "err", err)
	}
	l.troubled(err)
	for _, u := range batch {
		u.events, u.err = nil, fmt.Errorf("%w: %w", kind, l.Trouble())
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
// is what is on the disk, and Updates are taken again. It fails where the disk
// has less than was acknowledged, and where the database is another file.
func (l *Ledger) Reopen(ctx context.Context) error {
	if l.o.ReadOnly {
		return ErrReadOnly
	}
	return l.run(ctx, &update{alone: l.again})
}

func (l *Ledger) again() error {
	l.mu.RLock()
	old := l.store
	l.mu.RUnlock()
	// Before anything is read: a commit that failed may have left its
	// transaction open, and here it ends. Until the file was read again nothing
	// is written, whatever the reason to reopen.
	l.poison(errors.New("the ledger is being reopened"))
	logGone, err := old.untouched()
	if err == nil {
		end := old.retire
		if logGone {
			end = old.close
		}
		if err := end(); err != nil {
			l.o.Log.Warn("the ledger's old connection could not be closed", "err", err)
		}
		failpoint.Hit("ledger.reopen.before")
		err = l.load(context.Background(), l.head())
	}
	if err != nil {
		l.troubled(err)
		return fmt.Errorf("cannot reopen the ledger: %w", l.Trouble())
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

// borrow is the store, and the last event in it; s.reading.Done gives it back.
func (l *Ledger) borrow() (s *store, head uint64, err error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.store == nil {
		return nil, 0, ErrClosed
	}
	l.store.reading.Add(1)
	return l.store, l.root.meta.seq, nil
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
