package ledger

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"spectrum-os.org/broker/failpoint"
)

// ArchiveDir is where archives are, in the state directory.
const ArchiveDir = "archive"

// An archive is a database like the ledger's own: the same table, and the rows of
// one segment. It never changes.

// ArchiveName is an archive's, as its file says it.
type ArchiveName struct {
	Name        string `json:"name"`
	First, Last uint64 // events
	hash        string // the first digits of the last one's
}

const archivePrefix = 8 // digits of the hash in an archive's name

var archivePattern = regexp.MustCompile(`^ledger-([1-9][0-9]{0,18})-([1-9][0-9]{0,18})-([0-9a-f]{8})\.db$`)

func archiveName(first, last uint64, hash Hash) string {
	return fmt.Sprintf("ledger-%d-%d-%s.db", first, last, hex.EncodeToString(hash[:])[:archivePrefix])
}

func parseArchiveName(name string) (a ArchiveName, ok bool) {
	m := archivePattern.FindStringSubmatch(name)
	if m == nil {
		return a, false
	}
	first, err1 := strconv.ParseUint(m[1], 10, 63)
	last, err2 := strconv.ParseUint(m[2], 10, 63)
	return ArchiveName{name, first, last, m[3]}, err1 == nil && err2 == nil && first <= last
}

// Archives are those in a state directory, oldest first, by their names alone.
func Archives(dir string) ([]ArchiveName, error) {
	entries, err := os.ReadDir(filepath.Join(dir, ArchiveDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the archives: %w", err)
	}
	var out []ArchiveName
	for _, e := range entries {
		if a, ok := parseArchiveName(e.Name()); ok && e.Type().IsRegular() {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(x, y ArchiveName) int {
		return cmp.Or(cmp.Compare(x.First, y.First), cmp.Compare(x.Last, y.Last))
	})
	return out, nil
}

// archive is one that is being written.
type archive struct {
	dir, temp string
	db        *sql.DB
	chain     *chain // of what was put in
}

// newArchive makes an empty archive under a name that nobody takes for one. What
// an earlier attempt left is removed.
func newArchive(ctx context.Context, state string) (*archive, error) {
	dir := filepath.Join(state, ArchiveDir)
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = syncDir(state)
	} else if errors.Is(err, fs.ErrExist) {
		err = checkArchiveDir(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make the directory of archives: %w", err)
	}
	a := &archive{dir: dir, temp: filepath.Join(dir, "unfinished"), chain: newChain(nil)}
	if err := os.Remove(a.temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot make an archive: %w", err)
	}
	if err := makeFile(a.temp); err != nil {
		return nil, fmt.Errorf("cannot make an archive: %w", err)
	}
	// It has no journal: until it is whole it is nothing.
	if a.db, err = connect(a.temp, url.Values{}, "journal_mode(OFF)", "synchronous(OFF)", "locking_mode(EXCLUSIVE)"); err == nil {
		a.db.SetMaxOpenConns(1)
		err = a.schema(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make an archive: %w", err), a.drop())
	}
	return a, nil
}

// checkArchiveDir refuses one that somebody else put there, or a link that leads
// elsewhere.
func checkArchiveDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%w: %s is not a directory", ErrUnsafeDir, dir)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, so that others can write to it", ErrUnsafeDir, dir, perm)
	}
	return nil
}

func (a *archive) schema(ctx context.Context) error {
	for _, q := range append(slices.Clone(migrations),
		fmt.Sprintf("PRAGMA user_version = %d", len(migrations)), fmt.Sprintf("PRAGMA application_id = %d", applicationID)) {
		if _, err := a.db.ExecContext(ctx, q); err != nil {
			return err
		}
	}
	return nil
}

// add copies the rows of s that follow those it has, up to last, and sees to it
// that they are on the disk, and can be read back.
func (a *archive) add(ctx context.Context, s *store, last uint64) error {
	from := a.chain.last + 1
	if err := a.copy(ctx, s, last); err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	if a.chain.last != last {
		return fmt.Errorf("cannot write the archive: the ledger ends at event %d, and should at %d", a.chain.last, last)
	}
	if err := syncFile(a.temp); err != nil {
		return fmt.Errorf("cannot write the archive: %w", err)
	}
	failpoint.Hit("ledger.archive.synced")
	return a.readBack(ctx, max(from, a.chain.first), last)
}

func (a *archive) copy(ctx context.Context, s *store, last uint64) error {
	tx, err := a.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // after Commit it does nothing
	insert, err := tx.PrepareContext(ctx, insertEvent)
	if err != nil {
		return err
	}
	defer insert.Close()
	from := int64(a.chain.last + 1)
	if a.chain.events == 0 {
		from = 0
	}
	err = s.each(ctx, from, func(row int64, body, stored []byte) error {
		if uint64(row) > last {
			return errPageFull
		}
		hash := hashRecord(body)
		if string(hash[:]) != string(stored) {
			return &ChainError{Seq: uint64(row), Problem: BrokenHash, Detail: "it was changed since it was loaded"}
		}
		if _, _, err := a.chain.next(body); err != nil {
			return err
		}
		_, err := insert.ExecContext(ctx, row, body, stored)
		return err
	})
	if err != nil && !errors.Is(err, errPageFull) {
		return err
	}
	return tx.Commit()
}

// readBack compares what the archive gives with what was put in: it is the only
// copy soon.
func (a *archive) readBack(ctx context.Context, first, last uint64) error {
	rows, err := a.db.QueryContext(ctx, "SELECT seq, body, hash FROM events WHERE seq >= ? ORDER BY seq", int64(first))
	if err != nil {
		return fmt.Errorf("cannot read the archive back: %w", err)
	}
	defer rows.Close()
	c := newChain([]Anchor{{last, a.chain.hash}})
	var seq int64
	var body, stored sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&seq, &body, &stored); err != nil {
			return fmt.Errorf("cannot read the archive back: %w", err)
		}
		if _, hash, err := c.next(body); err != nil || string(hash[:]) != string(stored) || c.last != uint64(seq) {
			return fmt.Errorf("cannot read the archive back: event %d is another: %w", seq, cmp.Or(err, errRecord))
		}
	}
	if err := errors.Join(rows.Err(), c.end()); err != nil || c.first != first || c.last != last {
		return fmt.Errorf("cannot read the archive back: it has events %d to %d: %w", c.first, c.last, cmp.Or(err, errRecord))
	}
	return nil
}

// finish gives it its name, durably.
func (a *archive) finish() (ArchiveName, error) {
	c := a.chain
	name := archiveName(c.first, c.last, c.hash)
	err := a.db.Close()
	if a.db = nil; err == nil {
		err = syncFile(a.temp)
	}
	failpoint.Hit("ledger.archive.named.before")
	if err == nil {
		err = os.Rename(a.temp, filepath.Join(a.dir, name))
	}
	failpoint.Hit("ledger.archive.named.after")
	if err == nil {
		err = syncDir(a.dir)
	}
	if err != nil {
		return ArchiveName{}, fmt.Errorf("cannot finish the archive: %w", err)
	}
	made, _ := parseArchiveName(name)
	return made, nil
}

// drop forgets one that is not finished.
func (a *archive) drop() error {
	var err error
	if a.db != nil {
		err = a.db.Close()
		a.db = nil
	}
	if gone := os.Remove(a.temp); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}

// openArchive opens a database that nobody writes to.
func openArchive(ctx context.Context, path string) (*store, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("cannot open the archive: %w", err)
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("cannot open the archive: %s is no file", path)
	}
	s := &store{}
	var err error
	if s.readers, err = connect(path, url.Values{"mode": {"ro"}, "immutable": {"1"}}); err == nil {
		err = checkSchema(ctx, s.readers)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the archive: %w", err), s.close())
	}
	return s, nil
}

// Archive is an archive that is read.
type Archive struct {
	s           *store
	First, Last uint64 // events in it
}

// OpenArchive opens an archive, wherever it is.
func OpenArchive(ctx context.Context, path string) (*Archive, error) {
	s, err := openArchive(ctx, path)
	if err != nil {
		return nil, err
	}
	var first, last sql.NullInt64
	if err := s.readers.QueryRowContext(ctx, "SELECT min(seq), max(seq) FROM events").Scan(&first, &last); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot read the archive: %w", err), s.close())
	}
	if first.Int64 < 1 {
		return nil, errors.Join(fmt.Errorf("cannot read the archive: %w: it holds no events", ErrNotLedger), s.close())
	}
	return &Archive{s, uint64(first.Int64), uint64(last.Int64)}, nil
}

// Read returns events of the archive, each checked against its hash.
func (a *Archive) Read(ctx context.Context, r Reading) (Page, error) {
	r.After = max(r.After, a.First-1)
	return a.s.page(ctx, r, a.Last, links{from: r.After})
}

// Close closes the file.
func (a *Archive) Close() error { return a.s.close() }

// Archived finds a grant whose id begins with some hexadecimal digits and which is
// requested in one of a state directory's archives, the newest first.
func Archived(ctx context.Context, dir, digits string) (in ArchiveName, found bool, err error) {
	digits = strings.ToLower(strings.ReplaceAll(digits, "-", ""))
	prefix, err := hex.DecodeString(digits[:len(digits)/2*2])
	if err != nil || len(prefix) < 4 || len(prefix) > 16 {
		return in, false, nil // no grant is called so
	}
	all, err := Archives(dir)
	if err != nil {
		return in, false, err
	}
	for _, a := range slices.Backward(all) {
		s, err := openArchive(ctx, filepath.Join(dir, ArchiveDir, a.Name))
		if err != nil {
			return in, false, err
		}
		found, err := s.requested(ctx, prefix, digits)
		if err = errors.Join(err, s.close()); err != nil || found {
			return a, found, err
		}
	}
	return in, false, nil
}

// requested tells whether a grant was requested whose id begins with the digits,
// of which prefix are the whole bytes.
func (s *store) requested(ctx context.Context, prefix []byte, digits string) (bool, error) {
	// In a record its id follows the type, which nothing else is followed by.
	rows, err := s.readers.QueryContext(ctx, "SELECT body FROM events WHERE instr(body, ?) > 0", append([]byte(GrantRequested), prefix...))
	if err != nil {
		return false, fmt.Errorf("cannot read the archive: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var body sql.RawBytes
		if err := rows.Scan(&body); err != nil {
			return false, fmt.Errorf("cannot read the archive: %w", err)
		}
		var e entry
		if decodeEvent(body, &e) == nil && e.Type == GrantRequested && strings.HasPrefix(hex.EncodeToString(e.Grant[:]), digits) {
			return true, nil
		}
	}
	return false, rows.Err()
}
