package ledger

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/failpoint"
)

const (
	// markName is the file that knows the ledger from outside of its database.
	markName = "ledger.anchor"
	// A mark is written this often at most where much happens, and at least
	// where little does.
	markEvents  = 1024
	markSoonest = time.Second
	markLatest  = time.Minute
	maxMark     = 4096
)

// Mark is what a state directory knows of its ledger outside of the database:
// an event that was durable when the mark was written. A ledger that does not
// hold that very event is not the one that was there.
type Mark struct {
	Ledger uuid.UUID `json:"ledger"`
	Epoch  uint64    `json:"epoch"`
	Anchor
}

// readMark is the mark in dir; false where there is none.
func readMark(dir string) (Mark, bool, error) {
	path := filepath.Join(dir, markName)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Mark{}, false, nil
	}
	if err != nil {
		return Mark{}, false, fmt.Errorf("cannot read the ledger's anchor: %w", err)
	}
	defer f.Close()
	body, err := io.ReadAll(io.LimitReader(f, maxMark))
	if err != nil {
		return Mark{}, false, fmt.Errorf("cannot read the ledger's anchor: %w", err)
	}
	var m Mark
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	err = d.Decode(&m)
	if _, more := d.Token(); err == nil && !errors.Is(more, io.EOF) {
		err = errors.New("there is more after it")
	}
	if err == nil && (m.Ledger == uuid.Nil || m.Epoch == 0 || m.Seq == 0 || m.Hash == (Hash{})) {
		err = errors.New("it names no event")
	}
	if err != nil {
		return Mark{}, false, &SwapError{Dir: dir, Detail: fmt.Sprintf("its anchor %s is damaged: %v", markName, err)}
	}
	return m, true, nil
}

// writeMark puts a whole mark in the place of the one before, durably.
func writeMark(dir string, m Mark) error {
	body, err := json.Marshal(m)
	if err != nil {
		return err
	}
	fresh := filepath.Join(dir, markName+".new")
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(body, '\n'))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	failpoint.Hit("ledger.anchor.written")
	if err := os.Rename(fresh, filepath.Join(dir, markName)); err != nil {
		return err
	}
	failpoint.Hit("ledger.anchor.renamed")
	return syncDir(dir)
}

// witness looks for a mark's event while a ledger is loaded.
type witness struct {
	dir  string
	mark Mark
	has  bool // without a mark there is nothing to look for

	seen     bool
	instead  *Hash // of the event in its place
	replaced *Mark // by the last restoration
}

func newWitness(dir string) (*witness, error) {
	m, has, err := readMark(dir)
	return &witness{dir: dir, mark: m, has: has}, err
}

// see is told every event. What came before the first one that is stored is
// known by the link to it alone.
func (w *witness) see(e *entry, hash Hash) {
	if w == nil {
		return
	}
	if e.Type == LedgerRestored {
		if d, err := read[RestoredData](e); err == nil {
			w.replaced = d.Replaced
		}
	}
	switch {
	case w.has && e.Seq == w.mark.Seq:
		w.seen, w.instead = hash == w.mark.Hash, &hash
	case w.has && e.Seq == w.mark.Seq+1 && e.Prev == w.mark.Hash:
		w.seen = true
	}
}

// judge is nil where the ledger that was loaded is the one that the mark is of.
func (w *witness) judge(m *meta) error {
	if !w.has {
		return nil
	}
	e := &SwapError{Dir: w.dir, Want: &w.mark, Found: &Mark{m.ledger, m.epoch, Anchor{m.seq, m.hash}}}
	switch {
	case m.ledger != w.mark.Ledger:
		e.Detail = "it is another ledger"
	case w.seen:
		return nil
	case w.replaced != nil && *w.replaced == w.mark && m.epoch > w.mark.Epoch:
		// It was restored, and that was cut short before the mark followed.
		return nil
	case m.seq < w.mark.Seq:
		e.Detail = "an older copy was put back, or its end was cut off"
	case w.instead != nil:
		e.Detail = fmt.Sprintf("it has another event %d (%s): its history is another", w.mark.Seq, *w.instead)
	default:
		e.Detail = "the event is not in it"
	}
	return e
}

// gone tells that there is a mark and no database for it.
func (w *witness) gone(path string) error {
	info, err := os.Lstat(path)
	switch {
	case !w.has, err == nil && (info.Size() > 0 || !info.Mode().IsRegular()):
		return nil
	case err == nil:
		return &SwapError{Dir: w.dir, Want: &w.mark, Detail: "the database is empty"}
	case errors.Is(err, fs.ErrNotExist):
		return &SwapError{Dir: w.dir, Want: &w.mark, Detail: "the database is gone"}
	}
	return err
}

// SwapError says that the database in a state directory is not the one that
// was there.
type SwapError struct {
	Dir    string
	Detail string
	Want   *Mark // nil: what is known outside of the database is itself of no use
	Found  *Mark // nil: nothing was found
}

func (e *SwapError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v in %s: %s", ErrSwapped, e.Dir, e.Detail)
	if e.Found != nil {
		fmt.Fprintf(&b, "; found ledger %s in epoch %d, up to event %d", e.Found.Ledger, e.Found.Epoch, e.Found.Seq)
	}
	if e.Want != nil {
		fmt.Fprintf(&b, "; expected ledger %s in epoch %d, with event %d being %s", e.Want.Ledger, e.Want.Epoch, e.Want.Seq, e.Want.Hash)
	}
	fmt.Fprintf(&b, ". What was revoked could be in force again, so nothing is begun. "+
		"Put the right %[1]s back; or take what there is, or a backup, with every grant in it revoked: "+
		"spectrum-cap ledger restore --state %[2]s FILE (FILE may be %[2]s/%[1]s); "+
		"or empty %[2]s to begin with nothing", fileName, e.Dir)
	return b.String()
}

func (e *SwapError) Unwrap() error { return ErrSwapped }

// Exists tells whether there is a database in a state directory.
func Exists(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, fileName))
	return err == nil
}

// Marked tells whether the state directory has a mark of this ledger. From
// then on it is kept up to date.
func (l *Ledger) Marked() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.marked != (Mark{})
}

// Mark writes down outside of the database which event is the newest, durably,
// and makes that a habit: after each change of keys or epoch, when much was
// written, every minute in which something was, when the ledger is opened and
// when it is closed.
func (l *Ledger) Mark() error {
	if l.o.ReadOnly {
		return ErrReadOnly
	}
	if l.ctx.Err() != nil {
		return ErrClosed
	}
	return l.mark()
}

// mark names what is durable, and nothing newer: what is published was
// committed.
func (l *Ledger) mark() error {
	l.markMu.Lock()
	defer l.markMu.Unlock()
	l.mu.RLock()
	m, now := &l.root.meta, l.marked
	next := Mark{m.ledger, m.epoch, Anchor{m.seq, m.hash}}
	l.mu.RUnlock()
	if next == now {
		return nil
	}
	l.markedAt = time.Now()
	if err := writeMark(l.o.Dir, next); err != nil {
		return fmt.Errorf("cannot write the ledger's anchor: %w", err)
	}
	l.mu.Lock()
	l.marked = next
	l.mu.Unlock()
	return nil
}

// keepMarks renews the mark beside the commits, which do not wait for it.
func (l *Ledger) keepMarks() {
	tick := time.NewTicker(markLatest)
	defer tick.Stop()
	for {
		select {
		case <-l.marks:
			l.keepMark(false)
		case <-tick.C:
			l.keepMark(true)
		case <-l.ctx.Done():
			return
		}
	}
}

// keepMark renews the mark where one is kept and it is time. The one before
// stays true: that it cannot be renewed takes nothing back.
func (l *Ledger) keepMark(now bool) {
	if !l.markDue(now) {
		return
	}
	l.markMu.Lock()
	rested := time.Since(l.markedAt) >= markSoonest
	l.markMu.Unlock()
	if !now && !rested && !l.keysChanged() {
		return
	}
	if err := l.mark(); err != nil {
		l.o.Log.Error("the ledger is not marked as far as it goes: a swapped one would be noticed by less", "err", err)
	}
}

// markDue tells whether a mark is kept, and lags behind enough, or at all.
func (l *Ledger) markDue(now bool) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	m := &l.root.meta
	return l.marked != (Mark{}) && (now || m.keysSeq > l.marked.Seq || m.seq-l.marked.Seq >= markEvents)
}

func (l *Ledger) keysChanged() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.root.meta.keysSeq > l.marked.Seq
}
