package ledger

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"strings"

	sqlite3 "modernc.org/sqlite/lib"

	"spectrum-os.org/broker/failpoint"
)

// insertedAtOnce is how many rows insertMany inserts: in a shared commit, to
// run a statement costs more than to store its row.
const insertedAtOnce = 16

// writer is the one connection that writes, with its statements prepared: to
// prepare them for each commit costs as much as the commit. It runs them on the
// driver's own connection, since what database/sql does for each statement costs
// more than the statement.
type writer struct {
	conn                                        *sql.Conn
	begin, insert, insertMany, commit, rollback statement

	args []driver.NamedValue // of an insert; kept to be used again
}

// statement is a prepared one of the driver's.
type statement interface {
	driver.Stmt
	driver.StmtExecContext
}

func newWriter(ctx context.Context, db *sql.DB) (*writer, error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	w := &writer{conn: conn}
	if err := conn.Raw(func(c any) error { return w.prepare(ctx, c.(driver.ConnPrepareContext)) }); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *writer) prepare(ctx context.Context, c driver.ConnPrepareContext) error {
	for _, p := range []struct {
		stmt  *statement
		query string
	}{
		{&w.begin, "BEGIN IMMEDIATE"},
		{&w.insert, insertEvent},
		{&w.insertMany, insertEvent + strings.Repeat(", (?, ?, ?)", insertedAtOnce-1)},
		{&w.commit, "COMMIT"},
		{&w.rollback, "ROLLBACK"},
	} {
		stmt, err := c.PrepareContext(ctx, p.query)
		if err != nil {
			return err
		}
		*p.stmt = stmt.(statement)
	}
	return nil
}

func (w *writer) close() error {
	err := w.conn.Raw(func(any) error {
		var errs []error
		for _, s := range []statement{w.begin, w.insert, w.insertMany, w.commit, w.rollback} {
			if s != nil {
				errs = append(errs, s.Close())
			}
		}
		return errors.Join(errs...)
	})
	return errors.Join(err, w.conn.Close())
}

// write stores records in one transaction, durably when it returns. begun
// tells whether the commit was tried, so that a failure may have written them,
// or that the connection is of no more use. Only who leads the writing calls it.
func (s *store) write(records []record) (begun bool, err error) { return s.transact(records, false) }

// rewrite is write, with all events that were there taken out.
func (s *store) rewrite(records []record) (begun bool, err error) { return s.transact(records, true) }

func (s *store) transact(records []record, instead bool) (begun bool, err error) {
	// Not the caller's context: a commit is not half cancelled.
	ctx := context.Background()
	if s.writer == nil {
		if s.writer, err = newWriter(ctx, s.writing); err != nil {
			return false, err
		}
	}
	w := s.writer
	err = w.conn.Raw(func(c any) (err error) {
		clear := func() error { return nil }
		if instead {
			empty, err := c.(driver.ConnPrepareContext).PrepareContext(ctx, "DELETE FROM events")
			if err != nil {
				return err
			}
			defer empty.Close()
			clear = func() error {
				_, err := empty.(statement).ExecContext(ctx, nil)
				failpoint.Hit("ledger.rewrite.cleared")
				return err
			}
		}
		begun, err = w.write(ctx, records, clear)
		return err
	})
	return begun, err
}

func (w *writer) write(ctx context.Context, records []record, clear func() error) (begun bool, err error) {
	failpoint.Hit("ledger.begin.before")
	if _, err := w.begin.ExecContext(ctx, nil); err != nil {
		// A plain error is of a connection that is still in an earlier
		// transaction; any other may pass.
		return sqliteCode(err) == sqlite3.SQLITE_ERROR, err
	}
	failpoint.Hit("ledger.begin.after")
	if err := clear(); err != nil {
		_, _ = w.rollback.ExecContext(ctx, nil)
		return false, err
	}
	for rest := records; len(rest) > 0; {
		insert, n := w.insert, 1
		if len(rest) >= insertedAtOnce {
			insert, n = w.insertMany, insertedAtOnce
		}
		w.bind(rest[:n])
		rest = rest[n:]
		if _, err := insert.ExecContext(ctx, w.args); err != nil {
			// This fails, and need not be done, where SQLite rolled back by itself.
			_, _ = w.rollback.ExecContext(ctx, nil)
			return false, err
		}
		failpoint.Hit("ledger.insert.after")
	}
	failpoint.Hit("ledger.commit.before")
	if _, err := w.commit.ExecContext(ctx, nil); err != nil {
		// Whether it rolled back by itself, or can, makes the outcome no
		// better known.
		_, _ = w.rollback.ExecContext(ctx, nil)
		return true, err
	}
	failpoint.Hit("ledger.commit.after")
	return true, nil
}

// bind makes the arguments of an insert.
func (w *writer) bind(records []record) {
	w.args = w.args[:0]
	for i := range records {
		r := &records[i]
		for _, v := range [...]driver.Value{int64(r.seq), r.body, r.hash[:]} {
			w.args = append(w.args, driver.NamedValue{Ordinal: len(w.args) + 1, Value: v})
		}
	}
}
