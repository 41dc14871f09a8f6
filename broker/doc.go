// Package broker is the host daemon: it turns requests into grants and grants
// into truth.
//
// Its laws:
//
//   - A request is authenticated by the channel it came on, never by its
//     content; then resolved, parsed, checked against its parent, decided by
//     policy, and recorded, in that order. Only what is recorded is applied.
//   - Whatever goes wrong on that road is a refusal, and says where.
//   - A revocation that cannot be recorded is an error, and cuts access all the
//     same. It is recorded later, by the next broker if need be.
//   - The broker is the parent of no VM's process. It finds the shims again
//     after a restart, and is ready only when the world agrees with the ledger.
//   - A VM that ends, or reboots, takes its grants with it before its next run
//     begins, unless a grant was asked to persist.
package broker
