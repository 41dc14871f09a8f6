// Package cli is the command line spectrum-cap: what it takes, what it asks of
// the broker, and how it shows the answers.
//
// Its laws:
//
//   - It decides nothing: the broker does. Only "policy check", "policy test"
//     and "audit verify --state" work without one.
//   - Answers go to stdout, all else to stderr. -o json and -o yaml print what
//     the broker's API says, so that scripts need no other interface.
//   - Each kind of failure has an exit code of its own ([ExitCodes]).
//   - No token is taken on the command line, where every process sees it, nor
//     printed unasked.
//   - What partitions and guests may have chosen (names, paths, messages) is
//     printed without control characters: it must not drive a terminal.
package cli
