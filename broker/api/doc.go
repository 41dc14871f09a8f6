// Package api is the broker's two doors: HTTP/1.1 and JSON over a UNIX socket
// for the host's people, and over one UNIX socket per VM (hybrid vsock) for
// guests. It holds the JSON types that servers and clients share, both
// servers, the host's client, and the two OpenAPI documents that describe
// them.
//
// Its laws:
//
//   - A caller is who the kernel says: peer credentials on the host's socket,
//     the listener itself on a guest's. Nothing in a request names its sender.
//   - Every route is one row of a table (routes_host.go, routes_guest.go) and
//     names its access rule; a row without one does not serve.
//   - problem.go alone turns errors into answers. An error's cause is logged
//     and never sent; what is not an *Error is sent as "internal".
//   - Requests are decoded strictly: bounded, one value, no unknown field, no
//     duplicate field, no deep nesting.
//   - A guest is hostile: connections, headers, bodies, time and rate are
//     bounded before anything is parsed, per VM.
//   - Tokens leave only in the answers whose purpose they are, and no log
//     holds one.
//   - The package decides nothing: it calls Service and GuestService.
package api
