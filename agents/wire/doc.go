// Package wire is what the broker and an in-guest agent say to each other:
// HTTP/1.1 and JSON over vsock, the guest listening on [Port].
//
// Laws:
//   - Everything a guest says is a claim by an attacker. [Client] bounds it in
//     bytes and in time, decodes it strictly, and hands nothing on that it did
//     not check: no string of a guest reaches a log or a terminal unbounded or
//     with control characters in it.
//   - A call has a deadline or it is refused before anything is sent.
//   - One connection carries one exchange. Nothing is reused, redirected,
//     retried or continued, so a guest cannot speak out of turn.
//   - Access never depends on an answer. A guest that lies about a mount only
//     deceives itself.
package wire
