// Package vectors makes the test vectors of capabilities and their tokens, in
// files that a program in any language can read. README.md says how.
//
// Its law: it shares no code with the implementation. Every byte is put
// together here from the RFCs, so that the vectors are a second opinion and
// not an echo. The output depends on nothing but this package.
//
//go:generate go run ./generate
package vectors
