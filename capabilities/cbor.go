package capabilities

import "github.com/fxamacker/cbor/v2"

// The one way in which this package reads and writes CBOR: the core
// deterministic encoding of RFC 8949 §4.2.1, so that a value has one encoding.
// The decoder cannot see every deviation (it takes a number in more bytes than
// needed), so whoever decodes also encodes again and compares.
var (
	encMode = must(func() (cbor.EncMode, error) {
		o := cbor.CoreDetEncOptions()
		o.TagsMd = cbor.TagsForbidden
		return o.EncMode()
	})
	decMode = must(func() (cbor.DecMode, error) {
		return cbor.DecOptions{
			DupMapKey:                 cbor.DupMapKeyEnforcedAPF,
			IndefLength:               cbor.IndefLengthForbidden,
			TagsMd:                    cbor.TagsForbidden,
			ExtraReturnErrors:         cbor.ExtraDecErrorUnknownField,
			MaxNestedLevels:           8,
			MaxArrayElements:          64,
			MaxMapPairs:               16,
			UTF8:                      cbor.UTF8RejectInvalid,
			FieldNameMatching:         cbor.FieldNameMatchingCaseSensitive,
			NaN:                       cbor.NaNDecodeForbidden,
			Inf:                       cbor.InfDecodeForbidden,
			FieldNameByteString:       cbor.FieldNameByteStringForbidden,
			ByteStringToTime:          cbor.ByteStringToTimeForbidden,
			ByteStringExpectedFormat:  cbor.ByteStringExpectedFormatNone,
			BignumTag:                 cbor.BignumTagForbidden,
			BinaryUnmarshaler:         cbor.BinaryUnmarshalerNone,
			TextUnmarshaler:           cbor.TextUnmarshalerNone,
			JSONUnmarshalerTranscoder: nil,
		}.DecMode()
	})
)

// must is for options that are constants of this file.
func must[M any](mode func() (M, error)) M {
	m, err := mode()
	if err != nil {
		panic(err)
	}
	return m
}
