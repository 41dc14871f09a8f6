// Package ledger is the append-only, hash-chained log of events that is the
// broker's state and its audit at once.
//
// Its laws:
//
//   - State is a fold over the events. The one fold runs when an event is
//     appended and when it is loaded, on its decoded form, so that nothing can be
//     appended that could not be loaded.
//   - One caller at a time leads, and only who leads writes. Updates that wait
//     together share its transaction, and with it one fdatasync; each sees those
//     before it, and one that fails drops only its own events. Readers see only
//     what is committed.
//   - What Update returned is durable: WAL, synchronous=FULL. SQLite's log is as
//     long from the start as it is to become, so that a commit overwrites zeros
//     that are on the disk already, and it is moved beside the commits.
//   - After a commit that failed the outcome is unknown, and nothing more is
//     written until the file was read again.
//   - Every event is checked against the chain when it is loaded, and against
//     its hash whenever it is read.
//   - The chain has no secret: it shows damage and clumsy edits, and whoever can
//     write the file can make a whole new one. A cut-off tail leaves a whole
//     chain, and so does an older copy that is put back. These show only against
//     an event that is known from outside: the [Mark] beside the database, without
//     whose event no ledger is opened, or an [Anchor] kept elsewhere.
//   - The mark names what is durable, and never anything newer.
//   - A restored ledger begins a new epoch, in which every grant of before has
//     ended.
//   - Nothing is folded that another user could have put in place: the state
//     directory is refused where others can write to it. What an earlier process
//     left in SQLite's log is made durable before anything is built on it.
//   - A segment of the log begins with ledger.created, or with ledger.rotated and
//     all that was in force at the end of the archive before it; state is a fold
//     over the segment alone. Whatever is added to the state is carried (carry.go),
//     or a test fails.
//   - Nothing leaves the log before it is durable in an archive.
//   - Readers have connections of their own: none of them delays a commit.
//   - An expired grant is dead by the later of the clock and the latest wall time
//     ever recorded, so that a clock set back revives nothing.
//
// # Encoding
//
// An event is stored as one record and its hash:
//
//	hash = SHA-256("spectrum-broker ledger event" 00 || record)
//
//	record = version (1 byte, 1)
//	         seq     (8 bytes, big-endian)
//	         time    (8 bytes, big-endian, nanoseconds since 1970)
//	         prev    (32 bytes: the hash of event seq-1, zero for the first)
//	         flags   (1 byte: 1 grant, 2 vm, 4 partition, 8 uid, 16 actor vm;
//	                  which of the optional parts follow)
//	         type    (string)
//	         grant, vm, partition (16 bytes each, where flagged)
//	         actor kind (string), uid (4 bytes, where flagged),
//	         actor vm (16 bytes, where flagged), pid (uvarint)
//	         data kind (1 byte: 0 none, 1 JSON, 2 a grant.requested record,
//	                    3 carried state)
//	         data (string, unless none)
//
// The data of a grant.requested event, in JSON [GrantRecord]'s, is stored as
//
//	flags    (1 byte: 1 parent, 2 resource, 4 deadline, 8 max_depth,
//	          16 max_uses, 32 persist, 64 declared)
//	instance, label, capability (JSON), decision (JSON or empty) (strings)
//	parent   (16 bytes, where flagged)
//	resource (16 bytes, where flagged: the partition the resource belongs to)
//	deadline (where flagged: 8 bytes of wall time as above, boot id (string),
//	          boot time (uvarint, nanoseconds))
//	max_depth, max_uses (uvarint, where flagged)
//
// The data of ledger.carried is a version (1 byte, 1), a kind of item (1 byte), a
// count (uvarint) and as many items. What an item has, in order, is in carry.go. A
// text in it is the number that it has among the texts of the event (uvarint, from
// 1; 0: none), followed by the text itself (string) where it is the first time.
//
// A string is a uvarint length, in its shortest form, and that many bytes; an
// id that is flagged is not zero, but for the resource. A record is at most
// 1 MiB and has exactly one encoding; any other is refused.
package ledger
