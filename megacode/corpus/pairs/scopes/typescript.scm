; inherits: ecma
[
  (function_type) (constructor_type) (method_signature) (call_signature) (construct_signature)
  (abstract_method_signature) (function_signature)
] @function
[(interface_declaration) (type_alias_declaration) (abstract_class_declaration)] @block

(type_identifier) @typeword

(class_declaration name: (type_identifier) @typename)
(abstract_class_declaration name: (type_identifier) @typename)
(class name: (type_identifier) @type)
(interface_declaration name: (type_identifier) @typename)
(type_alias_declaration name: (type_identifier) @typename)
(enum_declaration name: (identifier) @type)
(type_parameter name: (type_identifier) @type)
(required_parameter pattern: (identifier) @var)
(optional_parameter pattern: (identifier) @var)

(required_parameter (accessibility_modifier) pattern: (identifier) @fixed)
(required_parameter "readonly" pattern: (identifier) @fixed)
(optional_parameter (accessibility_modifier) pattern: (identifier) @fixed)
(tuple_type (required_parameter name: (identifier) @keep))
(index_signature name: (identifier) @keep)
(nested_type_identifier name: (type_identifier) @keep)
