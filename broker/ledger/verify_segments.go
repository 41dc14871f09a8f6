package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
)

// VerifyReport is what Verify found.
type VerifyReport struct {
	Events      int         // that are whole
	First, Last uint64      // of them
	Head        Hash        // of the last of them
	Anchors     int         // that are part of the chain
	Ledger      uuid.UUID   // which one it is
	Epoch       uint64      // at its end
	Broken      *ChainError // the first broken link; nil: none
	// Archives are those that the chain goes through, the newest first.
	Archives []ArchiveReport
}

// ArchiveReport is what Verify found of an archive.
type ArchiveReport struct {
	ArchiveName
	Missing bool // it is not there, and what came before it is not looked at
}

// verified is a segment that was gone through.
type verified struct {
	*chain
	rest []Anchor // that are before it
}

// through goes through a segment, folds it, and returns what it can tell.
func through(ctx context.Context, s *store, w *witness, anchors []Anchor) (verified, error) {
	c := newChain(anchors)
	c.folder, c.layer, c.wantBegan, c.witness = &folder{newInterner()}, newLayer(nil), true, w
	err := c.all(ctx, s)
	switch {
	case err != nil:
	case c.events == 0:
		err = &ChainError{Seq: 1, Problem: BrokenGap, Detail: "a ledger is made with its first event, and that is missing"}
	default:
		err = c.complete()
	}
	if err == nil {
		err = w.judge(&c.layer.meta)
	}
	if swapped, ok := errors.AsType[*SwapError](err); ok {
		err = &ChainError{Seq: w.mark.Seq, Problem: BrokenAnchor, Detail: swapped.Detail}
	}
	v := verified{chain: c}
	for _, seq := range slices.Sorted(maps.Keys(c.known)) {
		switch {
		case seq < c.first:
			v.rest = append(v.rest, Anchor{seq, c.known[seq]})
		case err == nil:
			err = c.end()
		}
	}
	return v, err
}

// Mark is what was found of the ledger as a whole.
func (r *VerifyReport) Mark() Mark { return Mark{r.Ledger, r.Epoch, Anchor{r.Last, r.Head}} }

// Verify checks the whole chain in dir, through all archives that are there, and
// that the event that the directory itself knows (see Mark) and those in anchors
// are part of it. A segment must begin with exactly
// what was in force at the end of its archive. It changes no event and may run
// beside a broker. Cut-off newest events leave a valid chain: only an anchor shows
// them. A copy made while a broker ran needs the "-wal" file beside the database,
// or lacks its newest events.
func Verify(ctx context.Context, dir string, anchors ...Anchor) (VerifyReport, error) {
	// Before the database: what is marked later is not there yet.
	w, err := newWitness(dir)
	if err == nil {
		err = w.gone(filepath.Join(dir, fileName))
	}
	if err != nil {
		return VerifyReport{}, err
	}
	s, err := openToVerify(ctx, filepath.Join(dir, fileName))
	if err != nil {
		return VerifyReport{}, err
	}
	v, err := through(ctx, s, w, anchors)
	r, err := v.report(errors.Join(err, s.close()))
	if err == nil && r.Broken == nil {
		err = r.archives(ctx, dir, v)
	}
	return r, err
}

// archives goes back through what came before a segment.
func (r *VerifyReport) archives(ctx context.Context, dir string, v verified) error {
	for {
		from := v.layer.meta.segment
		if from.archive.Archive == "" {
			return nil
		}
		name, ok := parseArchiveName(from.archive.Archive)
		if !ok || name.First != from.archive.First || name.Last != from.archive.Last {
			r.Broken = &ChainError{Seq: from.first, Problem: BrokenUndecodable, Detail: fmt.Sprintf("%q is not the name of its archive", from.archive.Archive)}
			return nil
		}
		s, err := openArchive(ctx, filepath.Join(dir, ArchiveDir, name.Name))
		if errors.Is(err, fs.ErrNotExist) {
			r.Archives = append(r.Archives, ArchiveReport{name, true})
			if len(v.rest) > 0 {
				r.Broken = &ChainError{Seq: v.rest[0].Seq, Problem: BrokenAnchor, Detail: "it was anchored, and archive " + name.Name + " is not there to look"}
			}
			return nil
		}
		if err != nil {
			return err
		}
		r.Archives = append(r.Archives, ArchiveReport{ArchiveName: name})
		older, err := through(ctx, s, &witness{}, v.rest)
		err = errors.Join(err, s.close())
		if err == nil {
			err = from.follows(older, v.began)
		}
		if broken, ok := errors.AsType[*ChainError](err); ok {
			broken.Detail = "in archive " + name.Name + ": " + broken.Detail
			r.Broken = broken
			return nil
		}
		if err != nil {
			return err
		}
		r.First, r.Events, r.Anchors = older.first, r.Events+older.events, r.Anchors+older.met
		v = older
	}
}

// follows wants a segment to be the one that follows another.
func (s segment) follows(older verified, began [][]byte) error {
	d, m := &s.archive, &older.layer.meta
	broken := func(problem, format string, args ...any) error {
		return &ChainError{Seq: s.first, Problem: problem, Detail: fmt.Sprintf(format, args...)}
	}
	switch {
	case older.last != d.Last || older.hash != d.LastHash:
		return broken(BrokenPrev, "it ends with event %d, %s, and %d, %s is what is followed", older.last, older.hash, d.Last, d.LastHash)
	case older.first != d.First || older.firstHash != d.FirstHash:
		return broken(BrokenPrev, "it begins with event %d, %s, and should with %d, %s", older.first, older.firstHash, d.First, d.FirstHash)
	case m.ledger != d.Ledger || m.epoch != d.Epoch || m.highwater != d.Wall.UnixNano() || m.keysSeq != d.KeysSeq:
		return broken(BrokenIllegal, "it is of ledger %s in epoch %d, and ledger %s in epoch %d follows", m.ledger, m.epoch, d.Ledger, d.Epoch)
	case !slices.EqualFunc(older.layer.carried(), began, bytes.Equal):
		return broken(BrokenIllegal, "what was in force at its end is not what the events from %d on say", s.first)
	}
	return nil
}

// VerifyArchive checks one archive by itself.
func VerifyArchive(ctx context.Context, path string, anchors ...Anchor) (VerifyReport, error) {
	s, err := openArchive(ctx, path)
	if err != nil {
		return VerifyReport{}, err
	}
	return verifyOne(ctx, s, &witness{}, anchors)
}

// VerifyFile checks one database that is no state directory's by itself, such as a
// backup.
func VerifyFile(ctx context.Context, path string, anchors ...Anchor) (VerifyReport, error) {
	return verifyFile(ctx, path, &witness{}, anchors)
}

func verifyFile(ctx context.Context, path string, w *witness, anchors []Anchor) (VerifyReport, error) {
	s, err := openToVerify(ctx, path)
	if err != nil {
		return VerifyReport{}, err
	}
	return verifyOne(ctx, s, w, anchors)
}

func verifyOne(ctx context.Context, s *store, w *witness, anchors []Anchor) (VerifyReport, error) {
	v, err := through(ctx, s, w, anchors)
	if err == nil {
		err = v.end()
	}
	return v.report(errors.Join(err, s.close()))
}

// VerifyFrom checks the chain from an anchored event to its end, through the
// archives that lie between, and nothing before: that the event is what was
// anchored, and that each one that follows is bound to it. Whether the events
// before allow those that follow is not looked at.
func VerifyFrom(ctx context.Context, dir string, from Anchor, more ...Anchor) (VerifyReport, error) {
	s, err := openToVerify(ctx, filepath.Join(dir, fileName))
	if err != nil {
		return VerifyReport{}, err
	}
	defer s.close()
	c := newChain(append(more, from))
	err = c.archived(ctx, dir, s, from.Seq)
	if err == nil {
		err = c.links(ctx, s, max(from.Seq, c.last+1))
	}
	switch {
	case err != nil:
	case c.events == 0:
		err = &ChainError{Seq: from.Seq, Problem: BrokenAnchor, Detail: "it was anchored, and is not in the ledger"}
	default:
		err = c.end()
	}
	return c.report(err)
}

// archived adds what is in archives, from an event on.
func (c *chain) archived(ctx context.Context, dir string, s *store, from uint64) error {
	var first int64
	if err := s.readers.QueryRowContext(ctx, "SELECT coalesce(min(seq), 1) FROM events").Scan(&first); err != nil {
		return fmt.Errorf("cannot read the ledger: %w", err)
	}
	all, err := Archives(dir)
	if err != nil {
		return err
	}
	for from < uint64(first) {
		i := slices.IndexFunc(all, func(a ArchiveName) bool { return a.First <= from && from <= a.Last })
		if i < 0 {
			return &ChainError{Seq: from, Problem: BrokenGap, Detail: fmt.Sprintf("no archive that is there has it, and the ledger begins at event %d", first)}
		}
		a, err := openArchive(ctx, filepath.Join(dir, ArchiveDir, all[i].Name))
		if err != nil {
			return err
		}
		if err := errors.Join(c.links(ctx, a, from), a.close()); err != nil {
			return err
		}
		if from = all[i].Last + 1; c.last+1 != from {
			return &ChainError{Seq: c.last + 1, Problem: BrokenGap, Detail: "it is not in archive " + all[i].Name}
		}
	}
	return nil
}

// links adds rows from an event on.
func (c *chain) links(ctx context.Context, s *store, from uint64) error {
	err := s.each(ctx, int64(from), func(row int64, body, stored []byte) error {
		seq, hash := uint64(max(row, 0)), hashRecord(body)
		if c.events == 0 && seq == from {
			// What it follows is not known, and need not be: the anchor vouches.
			c.last = seq - 1
			var e entry
			if decodeEvent(body, &e) == nil {
				c.hash = e.Prev
			}
		}
		var claim []byte
		if string(hash[:]) != string(stored) {
			claim = stored
		}
		return c.add(seq, body, hash, claim)
	})
	if _, ok := errors.AsType[*ChainError](err); err != nil && !ok && ctx.Err() == nil && !transient(err) {
		err = &ChainError{Seq: c.last + 1, Problem: BrokenUnreadable, Detail: err.Error()}
	}
	return err
}

func openToVerify(ctx context.Context, path string) (*store, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("there is no ledger to verify: %w", err)
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("there is no ledger to verify: %w: %s is not a regular file", ErrNotLedger, path)
	}
	s := &store{}
	if err := s.open(ctx, path, true, "", time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the ledger: %w", err), s.close())
	}
	return s, nil
}
