package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// fileID is a file, whatever its name.
type fileID struct {
	path     string
	dev, ino uint64
}

// remember notes which files the store has open. SQLite writes on to a file that
// was deleted or replaced, and never says so.
func (s *store) remember(path string) error {
	for _, p := range []string{path, path + "-wal"} {
		var st unix.Stat_t
		if err := unix.Stat(p, &st); err != nil {
			return fmt.Errorf("cannot look at %s: %w", p, err)
		}
		s.files = append(s.files, fileID{p, st.Dev, st.Ino})
	}
	return nil
}

// present fails where a file of the store is not in its place any more.
func (s *store) present() error {
	for _, f := range s.files {
		if err := f.present(); err != nil {
			return err
		}
	}
	return nil
}

func (f *fileID) present() error {
	var st unix.Stat_t
	switch err := unix.Stat(f.path, &st); {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: %s was deleted", ErrGone, f.path)
	case err != nil:
		return fmt.Errorf("cannot look at %s: %w", f.path, err)
	case st.Dev != f.dev || st.Ino != f.ino:
		return fmt.Errorf("%w: %s was replaced", ErrGone, f.path)
	}
	return nil
}

// untouched fails where to open the files anew could do harm: a log is written
// into the database that it is found beside, whether or not it belongs to it. Once
// the store was retired, SQLite may have made a new one. logGone tells that the
// log has no name any more: all connections must be closed before others are
// made, and what it holds is moved into the database by the last of them.
func (s *store) untouched() (logGone bool, err error) {
	for i, f := range s.files {
		err := f.present()
		switch {
		case i > 0 && errors.Is(err, ErrGone) && !exists(f.path):
			logGone = true
		case err != nil && (i == 0 || !s.retired):
			return false, err
		}
	}
	return logGone, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// record writes records where the next broker will find them.
func (s *store) record(records []record) (begun bool, err error) {
	if begun, err = s.write(records); err == nil {
		// After the commit: what was deleted before it was written in vain.
		err, begun = s.present(), true
	}
	return begun, err
}

// settle makes durable what an earlier process, or a failed commit, left in
// the log without knowing whether it is: nothing may be built on events that
// a power cut could still take away. To sync the log would not do: after a sync
// that failed the next one succeeds, although what was lost is still lost. All
// of it is copied into the database, and that is synced.
func (s *store) settle(ctx context.Context) error {
	var busy, frames, moved int
	if err := s.writing.QueryRowContext(ctx, "PRAGMA wal_checkpoint(FULL)").Scan(&busy, &frames, &moved); err != nil {
		return err
	}
	if moved < frames {
		return fmt.Errorf("somebody still reads an older state of the ledger, so that %d pages of its log cannot be made durable", frames-moved)
	}
	// The log may be empty now. Somebody who reads it, or a disk that cannot make
	// it shorter, does no harm.
	for _, q := range []string{"PRAGMA busy_timeout = 0", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA busy_timeout = 5000"} {
		if _, err := s.writing.ExecContext(ctx, q); err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// Trouble is why the last attempt to write or to reopen the ledger failed, or
// nil. It may pass: the next Update tries again, or Reopen where the ledger is
// poisoned.
func (l *Ledger) Trouble() error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.trouble != nil {
		return l.trouble
	}
	return l.poisoned
}

// troubled keeps the last reason; nil: all is well.
func (l *Ledger) troubled(err error) {
	if err != nil && sqliteCode(err) != sqlite3.SQLITE_FULL && unix.Access(l.o.Dir, unix.W_OK) == unix.EROFS {
		// SQLite says only that it could not write.
		err = fmt.Errorf("%w: %w", err, unix.EROFS)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trouble = err
}

// Check looks whether the database is still where it was opened. Where it is
// not, nothing more is written until Reopen finds it again.
func (l *Ledger) Check() error {
	l.mu.RLock()
	s, poisoned := l.store, l.poisoned
	l.mu.RUnlock()
	if s == nil || poisoned != nil {
		return poisoned
	}
	err := s.present()
	if err != nil {
		l.broken(err)
	}
	return err
}

// broken has nothing more written to a ledger whose file is not what it was.
func (l *Ledger) broken(err error) {
	l.poison(err)
	l.troubled(err)
	l.o.Log.Error("the ledger's file is not what was written; it refuses everything until it is reopened", "err", err)
}

// noticed is an error of reading. Where it shows that what was written is not
// there any more, nothing is built on it.
func (l *Ledger) noticed(err error) error {
	_, damaged := errors.AsType[*ChainError](err)
	if code := sqliteCode(err); damaged || code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB {
		l.broken(err)
	}
	return err
}

// links checks that events which are read again still follow one another, from
// the one before the first to the newest.
type links struct {
	from   uint64
	newest Anchor
	prev   Hash
	known  bool // prev is
}

// begin is told the event before the first.
func (c *links) begin(body, stored []byte) error {
	c.prev, c.known = hashRecord(body), true
	if !bytes.Equal(c.prev[:], stored) {
		return &ChainError{Seq: c.from, Problem: BrokenHash, Detail: "it was changed since it was loaded"}
	}
	return nil
}

func (c *links) follow(e *Event, hash Hash) error {
	if c.known && e.Prev != c.prev {
		return &ChainError{Seq: e.Seq, Problem: BrokenPrev, Detail: "it or the event before it was changed since it was loaded"}
	}
	if e.Seq == c.newest.Seq && hash != c.newest.Hash {
		return &ChainError{Seq: e.Seq, Problem: BrokenHash, Detail: "it was changed since it was written, and so was its hash"}
	}
	c.prev, c.known = hash, true
	return nil
}

// head is the newest event that was acknowledged.
func (l *Ledger) head() Anchor {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return Anchor{l.root.meta.seq, l.root.meta.hash}
}

// Diagnose says in words what an error of Open, Update, Reopen, Trouble or
// Verify means, and what a person can do about it.
func Diagnose(err error) (what, remedy string) {
	const restore = "stop the broker and restore a backup with `spectrum-cap ledger restore`"
	broken, isBroken := errors.AsType[*ChainError](err)
	code := sqliteCode(err)
	switch {
	case err == nil:
		return "", ""
	case errors.Is(err, ErrGone):
		return err.Error(), "if it was moved, move it back (a copy is another file), and the broker goes on by itself; otherwise " + restore
	case isBroken:
		return "it is damaged: " + broken.Error(), restore
	case code == sqlite3.SQLITE_CORRUPT || code == sqlite3.SQLITE_NOTADB:
		return fmt.Sprintf("it is damaged: %v", err), restore
	case code == sqlite3.SQLITE_FULL || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return "the state directory's disk is full", "make room on it, and the broker goes on by itself"
	case code == sqlite3.SQLITE_READONLY || errors.Is(err, unix.EROFS):
		return "the state directory's file system is read-only", "see the kernel's log for why, and mount it writable; the broker then goes on by itself"
	case code == sqlite3.SQLITE_IOERR || errors.Is(err, unix.EIO):
		if e, ok := errors.AsType[*sqlite.Error](err); ok {
			err = e
		}
		return fmt.Sprintf("the state directory's disk fails (%v)", err), "see the kernel's log; the broker goes on by itself once the disk works, and if it never does, move the state directory to another one or " + restore
	}
	return err.Error(), "see the broker's log"
}
