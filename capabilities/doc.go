// Package capabilities says what may be done, and proves who may do it.
//
// A Capability is a kind, a resource and rights. Its Kind gives it meaning:
// how it is spelt, encoded, compared and narrowed. A Token is the broker's
// signed statement that one VM holds one capability.
//
// The laws that hold here, each with a property test:
//
//   - Covers is a partial order on the capabilities of a kind: reflexive,
//     transitive, and antisymmetric because every capability has exactly one
//     canonical value. Capabilities of different kinds are unrelated.
//   - Overlaps is symmetric, and says that some capability is covered by both.
//   - Attenuate never widens: its result is covered by what it was given.
//   - Parsing what String printed gives the same capability back, and so does
//     decoding what MarshalJSON or EncodeCBOR wrote.
//   - Decoding is strict: what has no place in the format (an unknown or
//     repeated key, a value in a form that is not the canonical one, bytes
//     after the end) is an error and never ignored.
//   - Only a Verified authorises. A Parsed is what a stranger claims; no
//     function that grants anything takes one.
//   - A Deadline is passed as soon as either of its two clocks says so, and a
//     clock of another boot never extends it.
//
// The package is pure. It does no I/O, reads no clock (time is an argument),
// and imports nothing else of this module.
//
// A new kind of capability is one file here: a type that implements Kind and
// one that implements Resource. Nothing else in the package names a kind.
package capabilities
