package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"spectrum-os.org/broker/failpoint"
)

const (
	fileName = "ledger.db"
	lockName = "ledger.lock"
	// applicationID marks the file as a ledger ("SpLg").
	applicationID = 0x53704c67
	// maxReaders is how many readers of events there are at once.
	maxReaders = 4
)

// migrations are the steps from each schema to the next. They are only ever
// added to. The version of a file is the number of steps that made it.
var migrations = []string{
	// seq is the rowid, so that the table is its only B-tree.
	`CREATE TABLE events (
		seq  INTEGER PRIMARY KEY,
		body BLOB NOT NULL,
		hash BLOB NOT NULL
	) STRICT`,
}

// store is the database file. Readers have connections of their own: a slow
// one never keeps the writer from its.
type store struct {
	writing *sql.DB // nil: open for reading only
	writer  *writer // nil until something is written
	readers *sql.DB
	tidying *sql.DB        // moves what the log holds into the database, beside the writer
	frames  atomic.Int64   // about how many the log holds
	reading sync.WaitGroup // those who may still use readers and tidying
	retired bool           // the writer's connection was closed
	files   []fileID       // that must stay where they are; none where it is open for reading only
}

// openStore opens the file, and makes it where it is missing, with its first
// event.
func openStore(ctx context.Context, dir string, readOnly bool, synchronous string, now time.Time) (*store, error) {
	path := filepath.Join(dir, fileName)
	s := &store{}
	if err := s.open(ctx, path, readOnly, synchronous, now); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the ledger: %w", err), s.close())
	}
	return s, nil
}

func (s *store) open(ctx context.Context, path string, readOnly bool, synchronous string, now time.Time) (err error) {
	if readOnly {
		return s.openReadOnly(ctx, path)
	}
	if err := makeFile(path); err != nil {
		return err
	}
	if err := useFdatasync(); err != nil {
		return err
	}
	pragmas := []string{
		"journal_mode(WAL)", "synchronous(" + synchronous + ")", "cache_size(-2048)",
		fmt.Sprintf("wal_autocheckpoint(%d)", longestLog),
	}
	if s.writing, err = connect(path, url.Values{"_txlock": {"immediate"}}, pragmas...); err != nil {
		return err
	}
	s.writing.SetMaxOpenConns(1)
	if err := migrate(ctx, s.writing, now); err != nil {
		return err
	}
	failpoint.Hit("ledger.migrate.after")
	if err := s.settle(ctx); err != nil {
		return err
	}
	failpoint.Hit("ledger.settle.after")
	if err := reserveLog(path + "-wal"); err != nil {
		return err
	}
	failpoint.Hit("ledger.reserve.after")
	if err := s.remember(path); err != nil {
		return err
	}
	if s.readers, err = connect(path, url.Values{"mode": {"ro"}}); err != nil {
		return err
	}
	s.readers.SetMaxOpenConns(maxReaders)
	if s.tidying, err = connect(path, url.Values{}, pragmas[1:]...); err != nil {
		return err
	}
	s.tidying.SetMaxOpenConns(1)
	return nil
}

func (s *store) openReadOnly(ctx context.Context, path string) (err error) {
	if s.readers, err = connect(path, url.Values{"mode": {"ro"}}); err != nil {
		return err
	}
	err = checkSchema(ctx, s.readers)
	if _, hasWAL := os.Stat(path + "-wal"); sqliteCode(err) == sqlite3.SQLITE_CANTOPEN && errors.Is(hasWAL, fs.ErrNotExist) {
		// The file is fine and nobody writes to it, but its directory does not
		// let the reader put its index there.
		if err := s.readers.Close(); err != nil {
			return err
		}
		if s.readers, err = connect(path, url.Values{"mode": {"ro"}, "immutable": {"1"}}); err != nil {
			return err
		}
		err = checkSchema(ctx, s.readers)
	}
	return err
}

// connect describes connections; it makes none yet.
func connect(path string, q url.Values, pragmas ...string) (*sql.DB, error) {
	q["_pragma"] = append([]string{"busy_timeout(5000)", "trusted_schema(0)"}, pragmas...)
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: q.Encode()}
	return sql.Open("sqlite", dsn.String())
}

// makeFile makes the file with a mode of its own: SQLite would take the
// umask's, and gives its other files the mode of this one. It never opens a
// file that exists: to close it again would drop the locks that this process
// has on it.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if errors.Is(err, fs.ErrExist) {
		info, err := os.Lstat(path)
		switch {
		case err != nil:
			return err
		case !info.Mode().IsRegular():
			return fmt.Errorf("%w: %s is not a regular file", ErrNotLedger, path)
		case info.Mode().Perm() != 0o600:
			return os.Chmod(path, 0o600)
		}
		return nil
	}
	if err != nil {
		return err
	}
	failpoint.Hit("ledger.file.made")
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// checkSchema refuses what is no ledger of a schema that is known, and says
// which schema it is; 0: an empty file.
func checkSchema(ctx context.Context, db *sql.DB) error {
	version, err := schemaOf(ctx, db)
	if err == nil && version == 0 {
		return fmt.Errorf("%w: it is empty", ErrNotLedger)
	}
	return err
}

func schemaOf(ctx context.Context, db *sql.DB) (version int, err error) {
	var id, events, others int
	for _, q := range []struct {
		text string
		into *int
	}{
		{"PRAGMA user_version", &version},
		{"PRAGMA application_id", &id},
		{"SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'events'", &events},
		// A trigger or a view could make a row say what was not written.
		{"SELECT count(*) FROM sqlite_schema WHERE type <> 'table' OR name <> 'events'", &others},
	} {
		if err := db.QueryRowContext(ctx, q.text).Scan(q.into); err != nil {
			if sqliteCode(err) == sqlite3.SQLITE_NOTADB {
				return 0, fmt.Errorf("%w: %w", ErrNotLedger, err)
			}
			return 0, err
		}
	}
	switch {
	case version == 0 && id == 0 && events == 0 && others == 0:
	case id != applicationID:
		return 0, fmt.Errorf("%w: its application id is %#x", ErrNotLedger, id)
	case version > len(migrations):
		return 0, fmt.Errorf("%w: its schema is %d, and this broker knows up to %d", ErrNewerSchema, version, len(migrations))
	case version < 1 || events != 1 || others != 0:
		return 0, fmt.Errorf("%w: it holds %d other things", ErrNotLedger, others)
	}
	return version, nil
}

func migrate(ctx context.Context, db *sql.DB, now time.Time) error {
	version, err := schemaOf(ctx, db)
	if err != nil {
		return err
	}
	for ; version < len(migrations); version++ {
		if err := step(ctx, db, version, now); err != nil {
			return fmt.Errorf("cannot bring it from schema %d to %d: %w", version, version+1, err)
		}
	}
	return nil
}

// step is one migration, whole or not at all.
func step(ctx context.Context, db *sql.DB, version int, now time.Time) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // after Commit it does nothing
	for _, q := range []string{
		migrations[version],
		fmt.Sprintf("PRAGMA user_version = %d", version+1),
		fmt.Sprintf("PRAGMA application_id = %d", applicationID),
	} {
		if _, err := tx.ExecContext(ctx, q); err != nil {
			return err
		}
	}
	if version == 0 {
		// Born with the schema, so that a file without events was robbed.
		r := birth(now)
		if _, err := tx.ExecContext(ctx, insertEvent, int64(r.seq), r.body, r.hash[:]); err != nil {
			return err
		}
	}
	failpoint.Hit("ledger.migrate.before")
	return tx.Commit()
}

const insertEvent = "INSERT INTO events (seq, body, hash) VALUES (?, ?, ?)"

// birth is the first event of a new ledger.
func birth(now time.Time) record {
	e := Event{Seq: 1, Time: now, Type: LedgerCreated, Actor: Actor{Kind: ActorBroker}}
	body := encodeEvent(nil, &e, dataJSON, mustJSON(CreatedData{Ledger: uuid.New(), Epoch: 1}))
	return record{e.Seq, body, hashRecord(body)}
}

// each calls fn with every stored record from the given sequence number on, in
// order. What fn is given is valid only until it returns.
func (s *store) each(ctx context.Context, from int64, fn func(seq int64, body, hash []byte) error) error {
	rows, err := s.readers.QueryContext(ctx, "SELECT seq, body, hash FROM events WHERE seq >= ? ORDER BY seq", from)
	if err != nil {
		return err
	}
	defer rows.Close()
	var seq int64
	var body, hash sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&seq, &body, &hash); err != nil {
			return err
		}
		if err := fn(seq, body, hash); err != nil {
			return err
		}
	}
	return rows.Err()
}

// retire ends the writer's connection, and with it a transaction that it may
// still be in.
func (s *store) retire() error {
	if s.writing == nil {
		return nil
	}
	s.retired = true
	var err error
	if s.writer != nil {
		err = s.writer.close()
		s.writer = nil
	}
	return errors.Join(err, s.writing.Close())
}

// close waits for the readers. Nobody may start to read any more. The writer's
// connection is the last, as the last one moves the log into the database: what
// is left is one file.
func (s *store) close() error {
	s.reading.Wait()
	var errs []error
	for _, db := range []*sql.DB{s.tidying, s.readers} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(append(errs, s.retire())...)
}

// sqliteCode is SQLite's primary result code, or 0.
func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() & 0xff
	}
	return 0
}
