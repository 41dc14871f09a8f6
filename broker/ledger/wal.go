package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"

	"spectrum-os.org/broker/failpoint"
)

// The write-ahead log. A commit writes its pages there, one after another, and
// waits until they are on the disk. From time to time what is there is moved into
// the database, after which the log is written from its beginning again.
const (
	// reservedLog is how long the log is from the start, in bytes: more than
	// tidyLog of its frames. Within that a commit overwrites, and the disk need
	// not also be told of a longer file.
	reservedLog = 4 << 20
	// tidyLog is how many frames are moved beside the writer.
	tidyLog = 600
	// longestLog is at how many frames a commit moves them itself: there was no
	// moment at which everything was moved.
	longestLog = 8000
	// reserveOf is of how much free space the reserve is one part: it must not
	// be what fills a small disk.
	reserveOf = 16
)

// useFdatasync has SQLite sync by fdatasync, as where it is configured for Linux:
// the data, and the size of the file, without the time at which it was changed.
func useFdatasync() error {
	if _, err := sqlite.Fdatasync(true); err != nil {
		return fmt.Errorf("cannot sync by fdatasync: %w", err)
	}
	return nil
}

// reserveLog lengthens the log by zeros, which no reader takes for frames. They
// are written, not merely allocated: to write to what is only allocated changes
// how the file is laid out, which each sync would have to store. Nobody else
// writes to the log, and SQLite keeps no locks on it that closing it would lose.
// Where there is no room for it, commits are slower and nothing else.
func reserveLog(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	var room unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &room); err != nil || size >= reservedLog ||
		room.Bavail*uint64(room.Bsize)/reserveOf < reservedLog {
		return nil
	}
	_, err = f.WriteAt(make([]byte, reservedLog-size), size)
	failpoint.Hit("ledger.reserve.before")
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return f.Truncate(size)
	}
	return nil
}

// framesOf is about how many frames of the log a commit of records takes.
func framesOf(records []record) int64 {
	const page = 4096
	bytes := 0
	for i := range records {
		bytes += len(records[i].body) + len(Hash{}) + 16
	}
	return int64(1 + bytes/page)
}

// tidy moves what the log holds into the database, beside the writer, and tells
// whether that was all.
func (s *store) tidy(ctx context.Context) (all bool, err error) {
	var busy, frames, moved int
	err = s.tidying.QueryRowContext(ctx, "PRAGMA wal_checkpoint(PASSIVE)").Scan(&busy, &frames, &moved)
	failpoint.Hit("ledger.tidy.after")
	return err == nil && moved == frames, err
}

// tidy keeps the log short, so that no commit has to: it tries until once
// everything was moved, as the next commit then begins the log anew.
func (l *Ledger) tidy() {
	for {
		select {
		case <-l.wrote:
		case <-l.ctx.Done():
			return
		}
		for pause := tidyPause; !l.tidied(); pause = min(2*pause, longestTidyPause) {
			select {
			case <-time.After(pause):
			case <-l.ctx.Done():
				return
			}
		}
	}
}

const (
	tidyPause        = 50 * time.Millisecond
	longestTidyPause = 5 * time.Second
)

func (l *Ledger) tidied() (all bool) {
	tidy := func() error {
		s, _, err := l.borrow()
		if err != nil {
			all = true
			return nil
		}
		defer s.reading.Done()
		if all, err = s.tidy(l.ctx); all {
			s.frames.Store(0)
		}
		return err
	}
	// The store is given back in between: who reopens the ledger waits for that,
	// and is not waited for.
	err := tidy()
	if err == nil {
		// Commits may have come meanwhile. What they wrote is little, and moved
		// while there are no more of them.
		err = l.run(l.ctx, &update{alone: tidy})
	}
	if err != nil && l.ctx.Err() == nil {
		// Nothing is lost by it: the log grows, and a commit that needs to moves it.
		l.o.Log.Warn("cannot move the ledger's log into its database yet", "err", err)
	}
	return all
}
