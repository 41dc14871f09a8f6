package ledger

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
)

// Errors of Open, Reopen and Verify.
var (
	// ErrLocked: another process has the state directory open; the error names
	// its pid.
	ErrLocked = errors.New("the ledger is in use by another broker")
	// ErrNewerSchema: the file was written by a newer broker; the error names
	// the schema.
	ErrNewerSchema = errors.New("the ledger was written by a newer broker")
	// ErrNotLedger: the file is a database, but not a ledger.
	ErrNotLedger = errors.New("not a ledger")
	// ErrUnsafeDir: users other than the broker's own could change the state
	// directory.
	ErrUnsafeDir = errors.New("unsafe state directory")
	// ErrSwapped: the database is not the one that the state directory knows;
	// always in a *SwapError.
	ErrSwapped = errors.New("the ledger is not the one that was there")
)

// Errors of Backup and Restore.
var (
	// ErrExists: the file to be written is there already.
	ErrExists = errors.New("it exists already")
	// ErrOtherLedger: the backup is of another ledger.
	ErrOtherLedger = errors.New("it is a backup of another ledger")
)

// Errors of Update and Reopen.
var (
	// ErrGone: a file of the ledger is not where it was opened any more.
	ErrGone = errors.New("the ledger's file is gone")
	// ErrUnknownOutcome: the commit failed; whether the events are on the disk
	// is not known before Reopen.
	ErrUnknownOutcome = errors.New("the ledger could not be written and the outcome is unknown")
	// ErrPoisoned: an earlier commit had an unknown outcome and Reopen has not
	// succeeded since.
	ErrPoisoned = errors.New("the ledger refuses to write until it is reopened")
	// ErrNotRecorded: the events are known not to be on the disk.
	ErrNotRecorded = errors.New("the events could not be recorded")
	// ErrReadOnly: the ledger was opened for reading.
	ErrReadOnly = errors.New("the ledger is open for reading only")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the ledger is closed")
)

// ErrBeyondHead: a cursor is behind the newest event. Error of Read.
var ErrBeyondHead = errors.New("the cursor is beyond the end of the ledger")

// Errors of Tx.Append. They drop nothing by themselves: the closure decides
// whether to go on.
var (
	// ErrIllegalMove: the table of moves, a binding or a name does not allow
	// the event in the present state.
	ErrIllegalMove = errors.New("illegal move")
	// ErrInvalidEvent: the event lacks an id it needs, or its data has the
	// wrong shape.
	ErrInvalidEvent = errors.New("invalid event")
	// ErrNotCovered: a derived grant is wider than its parent.
	ErrNotCovered = errors.New("the derived capability is wider than its parent")
)

// Errors of State.Live and State.Usable, always wrapped in a *DeadError.
var (
	ErrUnknownGrant = errors.New("no such grant")
	ErrRevoked      = errors.New("revoked")
	ErrFailed       = errors.New("failed")
	ErrExpired      = errors.New("expired")
	// ErrUsedUp: no use is left. What its last use gave goes on; nothing derives
	// from it, and its token is refused.
	ErrUsedUp = errors.New("used up")
)

// DeadError says why a grant gives nothing. Cause is the grant that ended:
// the one asked about, or the ancestor it died with.
type DeadError struct {
	Grant, Cause uuid.UUID
	Err          error
}

func (e *DeadError) Error() string {
	if e.Grant == e.Cause {
		return fmt.Sprintf("grant %s: %v", e.Grant, e.Err)
	}
	return fmt.Sprintf("grant %s: its ancestor %s: %v", e.Grant, e.Cause, e.Err)
}

func (e *DeadError) Unwrap() error { return e.Err }

// ChainError names the first broken link of the chain.
type ChainError struct {
	Seq     uint64 // the event at which the chain breaks
	Problem string // one of the Broken constants
	Detail  string
}

// What can be wrong with a link.
const (
	BrokenGap         = "gap"           // one or more events before it are missing
	BrokenPrev        = "prev mismatch" // it does not follow the event before it
	BrokenHash        = "hash mismatch" // its content is not what was hashed
	BrokenUndecodable = "undecodable"   // its content is no event of this schema
	BrokenIllegal     = "illegal move"  // the events before it do not allow it
	BrokenUnreadable  = "unreadable"    // the database cannot give it back
	BrokenAnchor      = "anchor"        // it is not the event that was anchored
)

func (e *ChainError) Error() string {
	return fmt.Sprintf("the ledger's chain is broken at event %d: %s: %s", e.Seq, e.Problem, e.Detail)
}
