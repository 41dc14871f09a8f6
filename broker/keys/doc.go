// Package keys holds the key that signs tokens, and says what the signatures of
// the keys before it are worth.
//
// Its laws:
//
//   - There is one private seed, that of the current key, in one file that only
//     its owner can read. The seed of a retired key is destroyed.
//   - The ledger says which key is current, and holds the public keys. A key
//     file that is not of the ledger's current key signs nothing and is refused.
//   - A new key is made durable beside the present one, then the ledger makes it
//     current, then it takes the file's place. Cut short anywhere, the next
//     start finishes or undoes it: there are never two keys, and never none.
//   - The key file names its ledger and epoch, so that a key without its ledger
//     is noticed; the ledger's anchor is written before the first key is.
//   - A token is signed by the current key only, and the ledger can tell for
//     every grant which keys signed for it: the one that was current when it was
//     made, and those that a token.issued names.
package keys
