package ledger

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/uuid"
	sqlite3 "modernc.org/sqlite/lib"

	"spectrum-os.org/broker/clock"
)

// restoringName is the database that is to take the place of the present one.
const restoringName = fileName + ".restoring"

// restoredReason is why every grant of before a restoration ends.
const restoredReason = "the ledger was restored from a backup"

// RestoreOptions say what to restore, and where.
type RestoreOptions struct {
	Dir   string // state directory
	File  string // backup; the directory's own database will do
	Clock clock.Clock
	Actor Actor
	// Known is what the key's file says of the ledger, if it says anything; its
	// event is not looked at.
	Known *Mark
	// StageKey makes a new key of a ledger and an epoch durable, without it being
	// in use; KeepKey makes it the one in use, once the ledger that names it is
	// in place.
	StageKey func(Mark) (ed25519.PublicKey, error)
	KeepKey  func() error
}

// RestoreReport says what was restored.
type RestoreReport struct {
	From     Mark   // the backup's newest event
	Mark     Mark   // the ledger as it is now
	Events   int    // that the backup held
	Ended    int    // grants that were not final
	KID      string // the new key
	Replaced string // what the replaced database is called now; "": there was none
}

// Restore puts a backup in the place of the ledger in a state directory that
// no broker uses, in a new epoch, with a new key, and with every grant that was
// not final ending: nothing that was given before is in force again. The
// database that was there is kept under another name.
//
// Cut short at any point it leaves the old ledger or the new one, and where it
// cannot be told which is right, one that is refused when it is opened.
func Restore(ctx context.Context, o RestoreOptions) (RestoreReport, error) {
	if err := prepareDir(o.Dir); err != nil {
		return RestoreReport{}, err
	}
	lock, err := takeLock(o.Dir)
	if err != nil {
		return RestoreReport{}, err
	}
	r := &restoration{o: o}
	for _, s := range r.steps() {
		if err := s.do(ctx); err != nil {
			err = fmt.Errorf("cannot restore the ledger: %s: %w", s.what, err)
			return r.report, errors.Join(err, clearRestoring(o.Dir), lock.Close())
		}
	}
	return r.report, lock.Close()
}

// restoration is one under way.
type restoration struct {
	o      RestoreOptions
	report RestoreReport

	mark   *Mark // what the state directory knows; nil: nothing of use
	public ed25519.PublicKey
}

type restoreStep struct {
	what string
	do   func(context.Context) error
}

// steps are everything that a restoration does. After each of them it may be
// cut short, and what is on the disk is all that the next start knows.
func (r *restoration) steps() []restoreStep {
	return []restoreStep{
		{"the backup is not fit", r.examine},
		{"the backup cannot be copied", r.copy},
		{"no new key could be made", r.stage},
		{"the new epoch could not be begun", r.begin},
		{"what was written is not fit", r.examineCopy},
		{"the present database could not be kept", r.keep},
		{"the new database could not be put in its place", r.swap},
		{"the new key could not be put in its place", func(context.Context) error { return r.o.KeepKey() }},
		{"the anchor could not be written", func(context.Context) error { return writeMark(r.o.Dir, r.report.Mark) }},
	}
}

func (r *restoration) path(name string) string { return filepath.Join(r.o.Dir, name) }

// examine refuses what is no whole ledger, or not this directory's.
func (r *restoration) examine(ctx context.Context) error {
	m, has, err := readMark(r.o.Dir)
	if has {
		r.mark = &m
	}
	if err != nil && !errors.Is(err, ErrSwapped) {
		return err // one that is damaged is what a restoration is for
	}
	found, err := VerifyFile(ctx, r.o.File)
	if err != nil {
		return err
	}
	if found.Broken != nil {
		return found.Broken
	}
	r.report.From, r.report.Events = found.Mark(), found.Events
	known := r.known(ctx)
	if len(known) > 0 && known[0].Ledger != found.Ledger {
		return fmt.Errorf("%w: %s is of ledger %s, and the one here is %s; to begin with another's, empty %s first",
			ErrOtherLedger, r.o.File, found.Ledger, known[0].Ledger, r.o.Dir)
	}
	r.report.Mark.Epoch = found.Epoch + 1
	for _, k := range known {
		if k.Ledger == found.Ledger {
			r.report.Mark.Epoch = max(r.report.Mark.Epoch, k.Epoch+1)
		}
	}
	return nil
}

// known is all that tells which ledger this directory's is and how far its
// epochs went, the most trustworthy first.
func (r *restoration) known(ctx context.Context) []Mark {
	var out []Mark
	if r.mark != nil {
		out = append(out, *r.mark)
	}
	if r.o.Known != nil {
		out = append(out, *r.o.Known)
	}
	// Whatever is wrong with the present database, it is being replaced.
	if here, err := VerifyFile(ctx, r.path(fileName)); err == nil && here.Ledger != uuid.Nil {
		out = append(out, here.Mark())
	}
	return out
}

func (r *restoration) copy(ctx context.Context) error {
	if err := clearRestoring(r.o.Dir); err != nil {
		return err
	}
	f, err := os.OpenFile(r.path(restoringName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(copyInto(ctx, r.o.File, f), f.Close())
}

// clearRestoring takes away what a restoration that was cut short left.
func clearRestoring(dir string) error {
	for _, suffix := range []string{"", "-journal", "-wal", "-shm"} {
		if err := os.Remove(filepath.Join(dir, restoringName+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (r *restoration) stage(context.Context) (err error) {
	r.public, err = r.o.StageKey(Mark{Ledger: r.report.From.Ledger, Epoch: r.report.Mark.Epoch})
	return err
}

// begin appends the new epoch to the copy, and its key.
func (r *restoration) begin(ctx context.Context) error {
	path := r.path(restoringName)
	s := &store{}
	defer s.close()
	if err := s.open(ctx, path, true, "", time.Time{}); err != nil {
		return err
	}
	now := r.o.Clock.Now()
	root := newLayer(nil)
	root.due = &deadlines{bootID: now.BootID}
	f := &folder{newInterner()}
	if _, err := load(ctx, s, f, root, nil); err != nil {
		return err
	}
	if at := (Anchor{root.meta.seq, root.meta.hash}); at != r.report.From.Anchor || root.meta.ledger != r.report.From.Ledger {
		return fmt.Errorf("%s changed while it was read", r.o.File)
	}
	for _, i := range root.open(uuid.Nil) {
		if !root.get(i).stateName().Final() {
			r.report.Ended++
		}
	}
	l := &Ledger{o: Options{Dir: r.o.Dir, Clock: r.o.Clock, Log: slog.New(slog.DiscardHandler)}, folder: f, root: root}
	tx := &Tx{ledger: l, layer: newLayer(root)}
	tx.now = tx.State().Effective(now)
	for _, e := range []Event{
		{Type: LedgerRestored, Actor: r.o.Actor, Data: mustJSON(RestoredData{
			Epoch: r.report.Mark.Epoch, From: r.report.From.Anchor, Reason: restoredReason, Replaced: r.mark,
		})},
		NewKey(r.o.Actor, r.public),
	} {
		if err := tx.Append(e); err != nil {
			return err
		}
	}
	m := &tx.layer.meta
	r.report.Mark, r.report.KID = Mark{m.ledger, m.epoch, Anchor{m.seq, m.hash}}, KID(r.public)
	if err := s.close(); err != nil {
		return err
	}
	// Without a log beside it: it is renamed alone.
	var err error
	s = &store{}
	if s.writing, err = connect(path, url.Values{"_txlock": {"immediate"}}, "journal_mode(DELETE)", "synchronous(EXTRA)"); err != nil {
		return err
	}
	s.writing.SetMaxOpenConns(1)
	if _, err = s.write(tx.records); err != nil {
		return errors.Join(err, s.close())
	}
	return s.close()
}

func (r *restoration) examineCopy(ctx context.Context) error {
	found, err := VerifyFile(ctx, r.path(restoringName), r.report.From.Anchor, r.report.Mark.Anchor)
	if err != nil {
		return err
	}
	if found.Broken != nil {
		return found.Broken
	}
	if _, err := os.Lstat(r.path(restoringName + "-wal")); err == nil {
		return errors.New("it has a log beside it")
	}
	return syncFile(r.path(restoringName))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// keep gives the present database a second name, with all in it that its log
// holds. A log that stayed beside it would be taken for the new one's.
func (r *restoration) keep(ctx context.Context) error {
	path := r.path(fileName)
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := foldLog(ctx, path); err != nil {
		return err
	}
	name, err := freeName(path + ".replaced-" + r.o.Clock.Now().Wall.UTC().Format("20060102T150405Z"))
	if err != nil {
		return err
	}
	if err := os.Link(path, name); err != nil {
		return err
	}
	r.report.Replaced = name
	// What is left of a log is that of a database which SQLite cannot read.
	if err := os.Rename(path+"-wal", name+"-wal"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Remove(path + "-shm"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(r.o.Dir)
}

// foldLog moves what SQLite's log holds into the database, and the log away.
func foldLog(ctx context.Context, path string) error {
	db, err := connect(path, url.Values{"_txlock": {"immediate"}}, "synchronous(FULL)")
	if err != nil {
		return err
	}
	var busy, frames, moved int
	err = db.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &frames, &moved)
	err = errors.Join(err, db.Close())
	switch sqliteCode(err) {
	case sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT:
		return nil
	}
	if err == nil && busy != 0 {
		return errors.New("somebody reads it just now; try again")
	}
	return err
}

// freeName is path, with a number after it where that is taken.
func freeName(path string) (string, error) {
	for i := 1; ; i++ {
		name := path
		if i > 1 {
			name += "-" + strconv.Itoa(i)
		}
		if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			return name, nil
		} else if err != nil {
			return "", err
		}
	}
}

func (r *restoration) swap(context.Context) error {
	if err := os.Rename(r.path(restoringName), r.path(fileName)); err != nil {
		return err
	}
	return syncDir(r.o.Dir)
}
